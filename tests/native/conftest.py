"""Fixtures of the native kernels' tests; without the library they are skipped, for `ref` is tested elsewhere."""

import pytest

from moe_unlearn import native
from tests.support.threads import torch_threads

WITHOUT_LIBRARY = ("test_build", "test_cuda", "test_cuda_device")


def pytest_collection_modifyitems(items):
    why = native.load("cpu")
    for item in items:
        if why and "native" in item.path.parts and item.path.stem not in WITHOUT_LIBRARY:
            item.add_marker(pytest.mark.skip(reason=f"_C_cpu {why}"))


@pytest.fixture(params=native.INSTRUCTION_SETS)
def instruction_set(request):
    """Runs the test once for each instruction set of this CPU."""
    if native.instruction_set(request.param) != request.param:
        native.instruction_set("")
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    native.instruction_set("")


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    """Runs the test once for each number of threads."""
    with torch_threads(request.param):
        yield request.param
