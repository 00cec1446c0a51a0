"""What a GPU is asked for in fifteen minutes: two commands of stages, each with its limit and its program.

Nothing is imported here that needs torch or the installed package: this is read where neither may be there yet.

    python -m tests.gpu_stages             exit status 0 where the native libraries are those of these sources, else 1
    python -m tests.gpu_stages --built     from now on they are
"""

import importlib.util
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import stamp

ROOT = Path(__file__).resolve().parent.parent
# where `make gpu-wheels` puts what a machine without a network may lack, and where a packed Triton cache is looked for:
# not in the folder of the ledger's own cache, which needs what is left out of this one
WHEELS, TRITON_CACHE = ROOT / "build" / "gpu-wheels", ROOT / "build" / "gpu-triton-cache"
# the hash of the sources that the libraries were built from
BUILT = ROOT / "moe_unlearn" / "_C_sources.txt"
WORKERS = 12

CUDA_TESTS = "tests/native/test_cuda_device.py"
# what every implementation of an op claims
OPS_TESTS = ("tests/ops", "--impl=cuda", "--impl=triton")
# these observe the interpreter or the tiles as numbers
_NOT_ON_A_GPU = {f"test_{name}" for name in ("checkers", "configs", "hardware", "memory", "overflow")}
TRITON_TESTS = tuple(
    str(path.relative_to(ROOT))
    for path in sorted((ROOT / "tests" / "triton_kernels").glob("test_*.py"))
    if path.stem not in _NOT_ON_A_GPU
)
WAIT_TESTS = "tests/test_synchronisation.py::test_on_a_gpu_every_other_wait_is_an_error"
# of the Triton tests a sample in which every value of every parameter occurs
SAMPLED = ("-m", "not nightly", "-p", "tests.gpu_plugin", "--covering=tests/triton_kernels", "--covering=tests/ops")
MATRIX = (CUDA_TESTS, WAIT_TESTS, *TRITON_TESTS, *OPS_TESTS, *SAMPLED)
# memcheck slows a test down twenty-fold: one case of each, without those that are about size, repetition and graphs, or
# about values, whose addresses others have too
_NO_MEMORY = (
    *(
        "million",
        "two_to_the_31",
        "every_time",
        "for_the_host",
        "solver",
        "compiles",
        "worked",
        "bad_options",
        "accura",
    ),
    *("autograd", "infinity", "zero", "at_the_cap", "rounded", "rounds", "steps", "wraps", "expanded", "left_to"),
)
SANITIZED = (
    CUDA_TESTS,
    "tests/ops",
    "--impl=cuda",
    "-p",
    "tests.gpu_plugin",
    "--one-each",
    "-k",
    " and ".join(f"not {word}" for word in _NO_MEMORY),
)


@dataclass(frozen=True)
class Stage:
    """A program with the seconds it may take; what it does not use goes to those after it."""

    name: str
    seconds: float
    what: str
    arguments: tuple[str, ...]  # of Python; {journal} and {seconds} are filled in
    divisible: bool = False  # knows --left

    def without(self, folder: Path) -> "Stage":
        """The stage without what the runs below a folder have done, where it can be divided."""
        return replace(self, arguments=(*self.arguments, "--left", str(folder))) if self.divisible else self

    def command(self, journal: Path, seconds: float) -> list[str]:
        """The command line, with the file it writes to and the time it has."""
        return [sys.executable, *(a.format(journal=journal, seconds=round(seconds, 1)) for a in self.arguments)]


def pytest_arguments(stage: str, tests: tuple[str, ...], *more: str) -> tuple[str, ...]:
    """Those of a stage that is pytest."""
    return ("-m", "pytest", "-p", "no:cacheprovider", *tests, *more, "--stage", stage, "--journal", "{journal}")


def parallel() -> tuple[str, ...]:
    """Pytest's options for many processes, where pytest-xdist is there."""
    if importlib.util.find_spec("xdist") is None:
        return ()
    return ("-n", str(WORKERS), "--dist", "worksteal", "--max-worker-restart", str(4 * WORKERS))


def measured(stage: str, *options: str) -> tuple[str, ...]:
    """The arguments of a stage that is a part of the benchmark suite."""
    return (
        "-m",
        "benchmarks.suite",
        "--device",
        "cuda",
        "--stage",
        stage,
        "--journal",
        "{journal}",
        "--seconds",
        "{seconds}",
        *options,
    )


def libraries(root: Path | None = None) -> list[Path]:
    """The native libraries that lie beside the package of a checkout, this one where none is given."""
    return sorted(((root or ROOT) / "moe_unlearn").glob("_C_*.so"))


def sources_hash() -> str:
    """The hash of what the libraries are made from, as it is now."""
    return stamp.kernel_sources_hash(ROOT, folders=("csrc",))


def built() -> bool:
    """Whether both libraries are there and are those of the sources as they are now."""
    known = BUILT.read_text(encoding="utf-8").strip() if BUILT.exists() else ""
    return len(libraries()) == 2 and known == sources_hash()


def commands() -> dict[int, tuple[Stage, ...]]:
    """The stages of both commands, in order."""
    # two libraries are 157 seconds of one core, and some 60 of many: the largest file cannot be divided
    build = 25.0 if built() else 100.0
    install = Stage(
        "install",
        build,
        "install offline, load or build the libraries, device and clocks",
        ("-m", "tests.gpu_install", "--journal", "{journal}"),
    )
    return {
        1: (
            install,
            Stage("smoke", 75.0, "every op of every implementation and two whole layers against ref",
                  ("-m", "tests.gpu_smoke", "--journal", "{journal}")),
            Stage("matrix", 140.0, "the CUDA tests and a covering sample of the Triton ones",
                  pytest_arguments("matrix", MATRIX, *parallel()), divisible=True),
            Stage("sanitizer", 40.0, "memcheck over one case of each CUDA test",
                  ("-m", "tests.gpu_sanitizer", "--journal", "{journal}")),
        ),
        2: (
            install,
            Stage("ops", 85.0, "the ops that targets depend on, CUDA and Triton side by side, and their peers",
                  measured("ops", "--part", "ops", "--tiers", "0"), divisible=True),
            Stage("steps", 95.0, "the whole step, published geometries, what matters first",
                  measured("steps", "--part", "steps"), divisible=True),
            Stage("rest", 25.0, "the gate shapes", measured("rest", "--part", "ops", "--tiers", "1"), divisible=True),
        ),
    }  # fmt: skip


TOTAL = {1: 300.0, 2: 240.0}


if __name__ == "__main__":
    if sys.argv[1:] == ["--built"]:
        BUILT.write_text(sources_hash() + "\n", encoding="utf-8")
    else:
        sys.exit(not built())
