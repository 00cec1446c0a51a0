"""Before anything imports Triton: without a GPU its kernels run in the interpreter."""

import collections
import fcntl
import gc
import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser):
    parser.addoption(
        "--impl",
        action="append",
        default=[],
        choices=("ref", "cpu", "triton", "cuda"),
        help="of tests/ops only what is about this implementation, or these; what names none is about the reference",
    )
    kinds = ("native", "exact", "sequential")
    parser.addoption(
        "--yardstick", choices=kinds, default="native", help="of references; see moe_unlearn.testing.yardstick"
    )


@pytest.fixture(scope="session", autouse=True)
def references_by(request):
    """The yardstick that --yardstick names, in every test."""
    from moe_unlearn.testing.yardstick import yardstick

    with yardstick(request.config.getoption("--yardstick")):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items):
    """Take the mark `slow(but=2)` off the first two cases of its test; give workers the files of what is left in order.

    The order counts where the workers' own is switched off, as `make` does with --no-loadscope-reorder.
    """
    seen = collections.Counter()
    for item in items:
        mark = item.get_closest_marker("slow")
        if mark and "but" in mark.kwargs:
            name = item.nodeid.partition("[")[0]
            seen[name] += 1
            if seen[name] <= mark.kwargs["but"]:
                item.own_markers.remove(mark)
    yield
    if "PYTEST_XDIST_WORKER" in os.environ:
        from tests.support.order import in_order

        places = {file: place for place, file in enumerate(in_order(item.nodeid for item in items))}
        items.sort(key=lambda item: places[item.nodeid.partition("::")[0]])


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    """What all tests have in common is no garbage: every training of transformers' Trainer would look through it."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """A test and its fixtures, shared ones too, draw the same numbers whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton kernels run: the GPU if there is one, else the CPU with the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def emulation(tmp_path_factory):
    """The CUDA kernels of every op for emulated threads; one process builds them for all of a session."""
    from tests.native import cuda

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # a worker's own folder lies in the session's
    library = folder / "libemulation.so"
    with open(folder / "libemulation.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            library = cuda.build_emulation(folder)
    return cuda.EmulatedOps(library)


@pytest.fixture
def gpu(emulation, monkeypatch):
    """impl="cpu" runs the CUDA kernels on an emulated GPU, which the fixture's `emulate` describes."""
    from moe_unlearn import native

    if native.load("cpu"):
        pytest.skip(f"_C_cpu {native.load('cpu')}")  # nothing would be registered as "cpu"
    emulation.emulate()
    monkeypatch.setattr(torch.ops, "moe_unlearn_native", emulation)
    return emulation


@pytest.fixture
def measurable_memory():
    """One thread: on the CPU torch's profiler sees the allocations of the thread that started it alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def rounded_sqrt(monkeypatch):
    """torch.optim with the correctly rounded square root, as ours has it: MKL's is a last bit off on some CPUs."""
    original = torch.Tensor.sqrt
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: original(x.double()).to(x.dtype))


@pytest.fixture(scope="session", autouse=True)
def trained_models_in_no_home(tmp_path_factory):
    """A user's home may be read-only, and may hold models that older code has trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_UNLEARN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="session", autouse=True)
def thrifty_interpreter():
    """Kernels in the interpreter cost a third less; see `thrifty`."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from tests.support.interpreter import thrifty

    with thrifty():
        yield


@pytest.fixture(scope="session", autouse=True)
def no_raw_bf16_dot():
    """The interpreter multiplies bfloat16 operands of `tl.dot` as raw bit patterns, without an error."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder

    original = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *arguments):
        for operand in (a, b):
            if operand.dtype.scalar.is_bf16():
                raise TypeError("tl.dot on bfloat16 operands in the interpreter: use common.dot")
        return original(self, a, b, *arguments)

    InterpreterBuilder.create_dot = create_dot
    yield
    InterpreterBuilder.create_dot = original
