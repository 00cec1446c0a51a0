"""Keep the ledger of what kernels cost: a compiler's figures for an architecture, and which changes are allowed.

    {"triton 3.9.0": {"sm_90": {"file/kernel/case": {"config": ..., "registers": ..., ...}}},
     "nvcc 13.0": {"sm_90a": {"case/kernel": {"registers": ..., ...}}}}

Registers are a compiler's choice, so figures of two compilers or versions are not compared.
"""

import json
import re
from pathlib import Path

from moe_unlearn.files import write_text

SHIPPED = Path(__file__).with_name("ledger.json")  # of the kernels of this package
# shared memory that a block may use, in KB by compute capability (CUDA C++ programming guide, technical specifications)
_SHARED_KB = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
GROWS = (
    "registers",
    "stack_bytes",
    "spills",
    "spill_bytes",
    "shared_bytes",
    "tensor_memory",
    "atomics",
    "float_atomics",
)
LOST = ("hgmma", "hmma", "utcmma", "tma", "cp_async")

Entries = dict[str, dict]
Ledger = dict[str, dict[str, Entries]]  # by compiler, then by architecture


class CorruptLedger(ValueError):
    """Error for a ledger that is not what `write` wrote."""


def capability(architecture: str) -> int:
    """Return 90 for "sm_90" and for "sm_90a"; raise ValueError for an architecture that is not known here."""
    match = re.fullmatch(r"sm_(\d+)[af]?", architecture)
    if match is None or int(match[1]) not in _SHARED_KB:
        known = ", ".join(f"sm_{number}" for number in _SHARED_KB)
        raise ValueError(f"expected an architecture, one of {known}; got {architecture!r}")
    return int(match[1])


def shared_bytes(capability: int) -> int:
    """Return how many bytes of shared memory a block may use."""
    return _SHARED_KB[capability] * 1024


def failures(arch: str, entries: Entries) -> list[str]:
    """Return lines on entries that cannot run at all: no binary, or more shared memory than there is."""
    found, limit = [], shared_bytes(capability(arch))
    for name, entry in entries.items():
        if "error" in entry:
            found.append(f"{_where(arch, name, entry)}: does not compile: {entry['error']}")
        elif entry["shared_bytes"] > limit:
            shared = f"{entry['shared_bytes']} bytes of shared memory; {limit} are there"
            found.append(f"{_where(arch, name, entry)}: {shared}")
    return found


def violations(arch: str, entries: Entries) -> list[str]:
    """Return lines on what none of our own kernels may do, whatever is recorded: `failures`, spills, float atomics."""
    found = failures(arch, entries)
    for name, entry in entries.items():
        where = _where(arch, name, entry)
        if entry.get("spills"):
            found.append(f"{where}: {entry['spills']} spilling instructions, {entry['stack_bytes']} bytes of stack")
        if "spill_bytes" in entry and (entry["spill_bytes"] or entry["stack_bytes"]):
            found.append(f"{where}: {entry['spill_bytes']} bytes spilled, {entry['stack_bytes']} bytes of stack")
        if entry.get("float_atomics"):
            found.append(f"{where}: {entry['float_atomics']} float atomics: sums in no fixed order")
    return found


def differences(arch: str, recorded: Entries, measured: Entries) -> list[str]:
    """Return lines on what got worse since `recorded`, and on entries without a counterpart."""
    found = [f"{arch} {name}: compiled, not in the ledger" for name in measured.keys() - recorded.keys()]
    found += [f"{arch} {name}: in the ledger, no longer compiled" for name in recorded.keys() - measured.keys()]
    for name in recorded.keys() & measured.keys():
        before, now = recorded[name], measured[name]
        if "error" in before or "error" in now:
            continue
        both = before.keys() & now.keys()
        changes = [f"{c} {before[c]} -> {now[c]}" for c in GROWS if c in both and now[c] > before[c]]
        changes += [f"{c} {before[c]} -> lost" for c in LOST if c in both and before[c] and not now[c]]
        if changes:
            line = f"{arch} {name}: {', '.join(changes)}"
            was = f"was [{before['config']}], " if before.get("config") != now.get("config") else ""
            found.append(f"{line}; {was}now [{now['config']}]" if "config" in now else line)
    return sorted(found)


def read(path: Path = SHIPPED) -> Ledger:
    """Return the ledger at `path`, empty if there is none; raise CorruptLedger, naming the file, if it is damaged."""
    if not path.exists():
        return {}
    try:
        ledger: Ledger = json.loads(path.read_text(encoding="utf-8"))
        whole = all(
            isinstance(entry, dict) and ("error" in entry or isinstance(entry["registers"], int))
            for by_arch in ledger.values()
            for entries in by_arch.values()
            for entry in entries.values()
        )
    except (ValueError, AttributeError, KeyError) as error:
        raise CorruptLedger(f"{path}: not a ledger of kernels: {error!r}") from error
    if not whole:
        raise CorruptLedger(f"{path}: not a ledger of kernels: an entry has no figures")
    return ledger


def write(ledger: Ledger, path: Path = SHIPPED) -> None:
    """Write the ledger whole or not at all, one line per entry, so that a changed kernel changes only its lines."""
    versions = []
    for version, by_arch in ledger.items():
        blocks = []
        for arch, entries in by_arch.items():
            lines = [f"      {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(entries.items())]
            blocks.append(f"    {json.dumps(arch)}: {{\n" + ",\n".join(lines) + "\n    }")
        versions.append(f"  {json.dumps(version)}: {{\n" + ",\n".join(blocks) + "\n  }")
    write_text(path, "{\n" + ",\n".join(versions) + "\n}\n")


def _where(arch: str, name: str, entry: dict) -> str:
    return f"{arch} {name} [{entry['config']}]" if "config" in entry else f"{arch} {name}"
