"""No kernel spills, adds floats atomically, outgrows shared memory or gets worse than the ledger says, on any GPU."""

import importlib.util
import os
from importlib import metadata

import pytest

from moe_unlearn.regress import ledger, static
from tests.static import ledger as tool

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)


def absent(message: str) -> None:
    """Fail where make runs the tests, for it has installed everything; elsewhere skip."""
    pytest.fail(f"{message}; make installs and records it") if "MAKELEVEL" in os.environ else pytest.skip(message)


def compare(arch: str, triton_folder=None) -> None:
    report = static.check([arch], cache_folder=tool.CACHE, compilers=["triton"], triton_folder=triton_folder)
    assert report.compared and not report.notes, report.notes
    assert not report.problems, "\n".join(["if meant so: make ledger", *report.problems])


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=() if arch == "sm_90" else pytest.mark.nightly) for arch in tool.ARCHITECTURES]
)
def test_every_kernel_costs_what_the_ledger_says(arch):
    version = f"triton {metadata.version('triton')}"
    if version not in ledger.read():
        absent(f"the ledger has no figures of {version}")
    compare(arch)


@pytest.mark.nightly
def test_the_oldest_supported_triton_compiles_every_kernel():
    if not (tool.OLDEST_FOLDER / "triton").is_dir():
        absent(f"Triton {tool.OLDEST} is not in {tool.OLDEST_FOLDER}")
    for arch in tool.OLDEST_ARCHITECTURES:
        compare(arch, tool.OLDEST_FOLDER)


@pytest.mark.quick
def test_every_kernel_is_in_the_ledger_and_nothing_else():
    assert not tool.uncovered(ledger.read(), tool.kernels_in_sources())


@pytest.mark.quick
def test_the_ledger_itself_holds_nothing_forbidden():
    for by_arch in ledger.read().values():
        for arch, entries in by_arch.items():
            assert not ledger.violations(arch, entries)
