"""Give static verdicts without a GPU: whether kernels still compile to as few registers, spills and shared bytes.

Triton kernels are compiled ahead of time and CUDA kernels by nvcc, for an architecture of choice. The machine code is
read and compared with a ledger: the shipped one for the kernels of this package, `static.json` in a user's store for
the user's kernels. Compiling is a function of source, compiler and architecture, so verdicts have no noise.

    moe-unlearn kernels check --static sm_90                                     our kernels
    moe-unlearn kernels record --static sm_90 --module softmax.py --store DIR    a user's; see `static_case`
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_unlearn.regress import compile as compiling
from moe_unlearn.regress import ledger as ledgers
from moe_unlearn.regress.ledger import CorruptLedger, Ledger
from moe_unlearn.regress.static_case import CudaCase, LaunchCase, TritonCase, register, registered

__all__ = [
    "LEDGER_NAME",
    "CorruptLedger",
    "CudaCase",
    "LaunchCase",
    "Report",
    "TritonCase",
    "check",
    "record",
    "register",
    "registered",
    "table",
]

LEDGER_NAME = "static.json"  # its name in a store
COLUMNS = {
    "registers": "regs",
    "stack_bytes": "stack",
    "spills": "spill",
    "spill_bytes": "spill B",
    "shared_bytes": "shared",
    "tensor_memory": "tmem",
    "hgmma": "HGMMA",
    "hmma": "HMMA",
    "utcmma": "UTCMMA",
    "tma": "TMA",
    "cp_async": "cp.async",
    "atomics": "atom",
    "float_atomics": "fp atom",
}


@dataclass(frozen=True)
class Report:
    """Findings: `problems` has a line each, `notes` says what could not be compiled or compared, and why."""

    measured: Ledger
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    compared: int = 0  # entries that were compared with the ledger

    @property
    def exit_code(self) -> int:
        """Return 0 if all is fine, 1 if something got worse, 3 if nothing could be compared on this machine."""
        return 1 if self.problems else 0 if self.compared else 3

    def summary(self) -> str:
        """Return one line that sums the report up."""
        entries = sum(len(entries) for by_arch in self.measured.values() for entries in by_arch.values())
        problems = f"{len(self.problems)} problem{'s' * (len(self.problems) != 1)}"
        return f"static: {entries} kernels compiled or known, {self.compared} compared with the ledger, {problems}"


def check(
    architectures: Sequence[str],
    kernels: Sequence[str] = (),
    ledger: Path | None = None,
    *,
    modules: Sequence[str] = (),
    everything: bool = False,
    **where: Any,
) -> Report:
    """Compile for `architectures` ("sm_80", "sm_90", "sm_100" ...) and compare with `ledger`.

    Without `modules` the kernels are ours and `ledger` is the shipped one; then spills and float atomics are problems
    whatever is recorded. With `modules` (paths or dotted names) the kernels are those they register, and `ledger`
    must be given. `kernels` selects entries: patterns, or the first parts of names ("route", "route/_count_kernel").
    A launch whose kernel, arguments and options are those of the ledger's entry is not compiled again unless
    `everything` is asked for, except for a tenth of them that rotates with the day.

    Only Triton's cache is written. `where` holds what `compile.run` takes: `compilers` ("triton", "nvcc"),
    `triton_folder`, `cache_folder`. Raises ValueError for an unknown architecture or a module that cannot be loaded,
    CorruptLedger (a ValueError) for a damaged ledger, and RuntimeError if the compiling process dies.
    """
    path = _ledger_path(ledger, modules)
    recorded = ledgers.read(path)  # read first, to report damage before minutes of compiling
    report = _compile(architectures, kernels, modules, None if everything else path, where)
    compared, rule = 0, ledgers.failures if modules else ledgers.violations
    for compiler, by_arch in report.measured.items():
        for arch, entries in by_arch.items():
            report.problems.extend(f"{compiler} {line}" for line in rule(arch, entries))
            if arch not in recorded.get(compiler, {}):
                report.notes.append(f"the ledger {path} has no figures of {compiler} for {arch}: nothing to compare")
                continue
            of_arch = recorded[compiler][arch]
            before = {name: entry for name, entry in of_arch.items() if compiling.selected(name, kernels)}
            compared += len(before.keys() & entries.keys())
            report.problems.extend(f"{compiler} {line}" for line in ledgers.differences(arch, before, entries))
    return Report(report.measured, report.problems, report.notes, compared)


def record(
    architectures: Sequence[str],
    kernels: Sequence[str] = (),
    ledger: Path | None = None,
    *,
    modules: Sequence[str] = (),
    everything: bool = False,
    **where: Any,
) -> Report:
    """Write what `check` would measure into `ledger`; entries of other compilers, architectures and kernels stay.

    The report's `notes` say what changed for the worse, its `problems` what may not be recorded. If there are
    problems, nothing is written. Arguments and errors are those of `check`.
    """
    path = _ledger_path(ledger, modules)
    recorded = ledgers.read(path)  # read first, to report damage before minutes of compiling
    report = _compile(architectures, kernels, modules, None if everything else path, where)
    count, rule = 0, ledgers.failures if modules else ledgers.violations
    for compiler, by_arch in report.measured.items():
        for arch, entries in by_arch.items():
            report.problems.extend(f"{compiler} {line}" for line in rule(arch, entries))
            before = recorded.setdefault(compiler, {}).get(arch, {})
            replaced = {name: entry for name, entry in before.items() if compiling.selected(name, kernels)}
            report.notes.extend(f"{compiler} {line}" for line in ledgers.differences(arch, replaced, entries))
            recorded[compiler][arch] = {name: before[name] for name in before.keys() - replaced.keys()} | entries
            count += len(entries)
    if count and not report.problems:
        ledgers.write(recorded, path)
    return Report(report.measured, report.problems, report.notes, count)


def table(measured: Ledger) -> str:
    """Return the figures as text: a block for each compiler and architecture, a line for each kernel; "·" is 0."""
    lines = []
    for compiler, by_arch in measured.items():
        for arch, entries in by_arch.items():
            columns = {key: title for key, title in COLUMNS.items() if any(key in entry for entry in entries.values())}
            width = max(map(len, [f"{compiler} {arch}", *entries]))
            lines += ["", f"{f'{compiler} {arch}':<{width}}" + "".join(f"{title:>9}" for title in columns.values())]
            for name, entry in entries.items():
                config = f"  {entry['config']}" if "config" in entry else ""
                if "error" in entry:
                    lines.append(f"{name:<{width}}{config}\n    {entry['error']}")
                    continue
                lines.append(f"{name:<{width}}" + "".join(f"{entry.get(key) or '·':>9}" for key in columns) + config)
    return "\n".join(lines[1:])


def _ledger_path(ledger: Path | None, modules: Sequence[str]) -> Path:
    if ledger is None and modules:
        raise ValueError("expected the ledger of your own modules' kernels; the shipped one is of ours")
    return ledgers.SHIPPED if ledger is None else Path(ledger)


def _compile(
    architectures: Sequence[str],
    kernels: Sequence[str],
    modules: Sequence[str],
    recorded: Path | None,
    where: dict[str, Any],
) -> Report:
    if not architectures:
        raise ValueError("expected at least one architecture, like sm_90")
    for arch in architectures:
        ledgers.capability(arch)
    measured, notes = compiling.run(architectures, kernels, modules, recorded, **where)
    return Report(measured, [], notes)
