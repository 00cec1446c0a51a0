"""The fixture `impl`: a test of tests/ops/<op> that takes it runs once for each implementation that the op has."""

import zlib
from pathlib import Path

import pytest
import torch

from moe_unlearn import native
from moe_unlearn.regress import nvcc
from tests.support.impls import Impl, impl_of, impls
from tests.triton_kernels import tiles

HERE = Path(__file__).parent
HOPPER = ("expert_mlp", "expert_wgrad")  # ops whose CUDA kernels multiply by wgmma


def kind_of(item: pytest.Item) -> str:
    """Return the implementation that an item of this folder is about."""
    return item.callspec.params.get("impl", "ref") if hasattr(item, "callspec") else "ref"


def of_op(item: pytest.Item) -> str:
    """Return the op whose folder an item stands in."""
    return item.path.parent.name


def pytest_generate_tests(metafunc):
    """Give `impl` the implementations of the folder's op, where the test itself does not say which."""
    named = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "impl" in metafunc.fixturenames and not any("impl" in names.split(",") for names in named):
        metafunc.parametrize("impl", impls(metafunc.definition.path.parent.name), indirect=True)


def pytest_itemcollected(item):
    """Skip kernels that cannot run here, for a stated reason.

    Of slow kernels `make quick` runs little: one case of each test in Triton's interpreter, none of what is emulated.
    """
    kind, why = kind_of(item), None
    if kind == "cuda" and not torch.cuda.is_available():
        item.add_marker(pytest.mark.slow)
        # "cpu", in whose place it is emulated, must be registered
        why = "there is no nvcc" if nvcc.compiler() is None else native.load("cpu") and f"_C_cpu {native.load('cpu')}"
    elif kind == "cuda" and of_op(item) in HOPPER and torch.cuda.get_device_capability() != (9, 0):
        why = "needs Hopper: wgmma is nowhere else"
    elif kind == "triton" and hasattr(tiles, of_op(item)):
        item.add_marker(pytest.mark.slow(but=1))
    elif kind in native.LIBRARIES and native.load(kind):
        why = f"_C_{kind} {native.load(kind)}"
    if why:
        item.add_marker(pytest.mark.skip(reason=why))


def pytest_collection_modifyitems(config, items):
    """Keep of this folder what --impl names."""
    wanted, kept, dropped = config.getoption("--impl"), [], []
    for item in items:
        ours = wanted and HERE in item.path.parents
        (dropped if ours and kind_of(item) not in wanted else kept).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.fixture
def impl(request, monkeypatch) -> Impl:
    """The implementation; emulated, it has a GPU of its own size and an order of threads of its own in each test.

    Triton's has small tiles, where there are some for the op.
    """
    if request.param == "cuda" and not torch.cuda.is_available():
        seed = zlib.crc32(request.node.name.encode())
        request.getfixturevalue("gpu").emulate(1 + seed % 3, seed=seed)
    if request.param == "triton" and hasattr(tiles, of_op(request.node)):
        getattr(tiles, of_op(request.node))(monkeypatch)
    return impl_of(request.param)
