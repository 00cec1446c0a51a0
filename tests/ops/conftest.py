"""The fixture `impl`: a test of tests/ops/<op> that takes it runs once for each implementation that the op has."""

import zlib

import pytest
import torch

from moe_unlearn import native
from moe_unlearn.regress import nvcc
from tests.support.impls import Impl, impl_of, impls


def pytest_generate_tests(metafunc):
    """Give `impl` the implementations of the folder's op, where the test itself does not say which."""
    named = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "impl" in metafunc.fixturenames and not any("impl" in names.split(",") for names in named):
        metafunc.parametrize("impl", impls(metafunc.definition.path.parent.name), indirect=True)


def pytest_itemcollected(item):
    """Leave emulated kernels out of `make quick`, and out of everything where nothing compiles them."""
    if hasattr(item, "callspec") and item.callspec.params.get("impl") == "cuda" and not torch.cuda.is_available():
        item.add_marker(pytest.mark.slow)
        item.add_marker(pytest.mark.skipif(nvcc.compiler() is None, reason="there is no nvcc"))


@pytest.fixture
def impl(request) -> Impl:
    """The implementation; emulated, it has a GPU of its own size and an order of threads of its own in each test."""
    kind = request.param
    if kind == "cuda" and not torch.cuda.is_available():
        seed = zlib.crc32(request.node.name.encode())
        request.getfixturevalue("gpu").emulate(1 + seed % 3, seed=seed)
    elif kind in native.LIBRARIES and native.load(kind):
        pytest.skip(f"_C_{kind} {native.load(kind)}")
    return impl_of(kind)
