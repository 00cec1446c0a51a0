"""No kernel spills, adds floats atomically, outgrows shared memory or gets worse than the ledger says, on any GPU."""

import importlib.util
import os
from importlib import metadata

import pytest

from tests.static import compile as tool
from tests.static import ledger

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)


def absent(message: str) -> None:
    """In `make test` everything must be there; elsewhere it need not be."""
    pytest.fail(f"{message}; make installs and records it") if "MAKELEVEL" in os.environ else pytest.skip(message)


def compare(triton_folder, arch: int) -> None:
    version, measured = ledger.measure(triton_folder, (arch,), everything=False)
    recorded = ledger.read()[version]
    name = f"sm_{arch}"
    found = ledger.violations(name, measured[name]) + ledger.differences(name, recorded[name], measured[name])
    assert not found, "\n".join([f"{version}; if meant so: make ledger", *found])


@pytest.mark.slow
@pytest.mark.parametrize("arch", tool.ARCHITECTURES)
def test_every_kernel_costs_what_the_ledger_says(arch):
    version = f"triton {metadata.version('triton')}"
    if version not in ledger.read():
        absent(f"the ledger has no figures of {version}")
    compare(None, arch)


@pytest.mark.slow
def test_the_oldest_supported_triton_compiles_every_kernel():
    if not (ledger.OLDEST_FOLDER / "triton").is_dir():
        absent(f"Triton {ledger.OLDEST} is not in {ledger.OLDEST_FOLDER}")
    for arch in ledger.OLDEST_ARCHITECTURES:
        compare(ledger.OLDEST_FOLDER, arch)


@pytest.mark.quick
def test_every_kernel_is_in_the_ledger_and_nothing_else():
    assert not ledger.uncovered(ledger.read(), ledger.kernels_in_sources())


@pytest.mark.quick
def test_the_ledger_itself_holds_nothing_forbidden():
    for by_arch in ledger.read().values():
        for arch, entries in by_arch.items():
            assert not ledger.violations(arch, entries)
