"""The ledger of what every kernel costs: `make ledger` records it, `test_ledger.py` compares with it.

ledger.json: {"triton 3.9.0": {"sm_90": {"file/kernel/case": {"config": ..., "registers": ..., ...}}}}. Recorded are
all architectures for the Triton that runs the tools and sm_90 for the oldest supported one.
"""

import argparse
import ast
import json
import sys
import tempfile
from pathlib import Path

from tests.static import compile as tool

LEDGER = tool.LEDGER
KERNELS = tool.ROOT / "triton_kernels"
OLDEST = "3.6.0"
OLDEST_FOLDER = tool.ROOT / ".venv" / f"triton-{OLDEST}"
OLDEST_ARCHITECTURES = (90,)
# what a block may use, in bytes: 163 KB on A100, 227 KB on H100 and B200
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
GROWS = ("registers", "stack_bytes", "shared_bytes", "tensor_memory", "atomics")
LOST = ("hgmma", "hmma", "utcmma", "tma", "cp_async")

Entries = dict[str, dict]


def violations(arch: str, entries: Entries) -> list[str]:
    """What no kernel may do, whatever is recorded."""
    found = []
    for name, entry in entries.items():
        where = f"{arch} {name} [{entry['config']}]"
        if "error" in entry:
            found.append(f"{where}: does not compile: {entry['error']}")
            continue
        if entry["spills"]:
            found.append(f"{where}: {entry['spills']} spilling instructions, {entry['stack_bytes']} bytes of stack")
        if entry["shared_bytes"] > SHARED_LIMIT[arch]:
            found.append(f"{where}: {entry['shared_bytes']} bytes of shared memory; {SHARED_LIMIT[arch]} are there")
        if entry["float_atomics"]:
            found.append(f"{where}: {entry['float_atomics']} float atomics: sums in no fixed order")
    return found


def unmatched(arch: str, recorded: Entries, measured: Entries) -> list[str]:
    """The entries without a counterpart."""
    found = [f"{arch} {name}: compiled, not in the ledger" for name in measured.keys() - recorded.keys()]
    return found + [f"{arch} {name}: in the ledger, no longer compiled" for name in recorded.keys() - measured.keys()]


def differences(arch: str, recorded: Entries, measured: Entries) -> list[str]:
    """What got worse since `recorded`, and which entries have no counterpart."""
    found = unmatched(arch, recorded, measured)
    for name in recorded.keys() & measured.keys():
        before, now = recorded[name], measured[name]
        if "error" in before or "error" in now:
            continue
        changes = [f"{c} {before[c]} -> {now[c]}" for c in GROWS if now[c] > before[c]]
        changes += [f"{c} {before[c]} -> lost" for c in LOST if before[c] and not now[c]]
        if changes:
            configs = [f"was [{before['config']}],"] * (before["config"] != now["config"])
            found.append(" ".join([f"{arch} {name}:", ", ".join(changes), "   ", *configs, f"now [{now['config']}]"]))
    return sorted(found)


def uncovered(ledger: dict, kernels: set[str]) -> list[str]:
    """Kernels of the sources without an entry, entries without a kernel. An entry's name is file/kernel/case."""
    recorded = {
        "/".join(name.split("/")[:2]) for version in ledger.values() for of_arch in version.values() for name in of_arch
    }
    found = [f"{kernel}: in the sources, never in the ledger" for kernel in kernels - recorded]
    return sorted(found + [f"{kernel}: in the ledger, not in the sources" for kernel in recorded - kernels])


def kernels_in_sources() -> set[str]:
    """ "file/_name_kernel" of every kernel in triton_kernels/."""
    return {
        f"{path.stem}/{node.name}"
        for path in KERNELS.glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("_") and node.name.endswith("_kernel")
        if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }


def measure(
    triton_folder: Path | None, architectures: tuple[int, ...], everything: bool
) -> tuple[str, dict[str, Entries]]:
    """("triton <version>", figures by architecture), compiled in a fresh process.

    Unless `everything` is asked for, a launch whose kernel, arguments and options are those of the ledger's entry is
    taken from there, except a tenth of them that rotates with the day: a compiler's answer is a function of these.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        options = [f"--arch={arch}" for arch in architectures]
        if not everything:
            options.append(f"--recorded={LEDGER}")
        if triton_folder:
            options.append(f"--triton={triton_folder}")
        done = tool.run("--json", str(file), *options, triton_folder=triton_folder, capture_output=True, text=True)
        if not file.exists():
            raise RuntimeError(f"the compiling process failed:\n{done.stdout}\n{done.stderr}")
        result = json.loads(file.read_text())
    for entries in result["measured"].values():
        for entry in entries.values():
            entry.pop("seconds", None)
    return f"triton {result['triton']}", result["measured"]


def read() -> dict[str, dict[str, Entries]]:
    return json.loads(LEDGER.read_text())


def write(ledger: dict[str, dict[str, Entries]], path: Path | None = None) -> None:
    """One line per entry, so that a change of one kernel is a change of its lines."""
    versions = []
    for version, by_arch in ledger.items():
        blocks = []
        for arch, entries in by_arch.items():
            lines = [f"      {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(entries.items())]
            blocks.append(f"    {json.dumps(arch)}: {{\n" + ",\n".join(lines) + "\n    }")
        versions.append(f"  {json.dumps(version)}: {{\n" + ",\n".join(blocks) + "\n  }")
    (path or LEDGER).write_text("{\n" + ",\n".join(versions) + "\n}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description="Record tests/static/ledger.json anew and say what changed.")
    parser.add_argument("--oldest", type=Path, default=OLDEST_FOLDER, help=f"the folder that holds Triton {OLDEST}")
    parser.add_argument("--everything", action="store_true", help="also what has not changed since it was recorded")
    arguments = parser.parse_args()
    before = read() if LEDGER.exists() else {}
    everything = arguments.everything or not before
    ledger = dict(
        [measure(None, tool.ARCHITECTURES, everything), measure(arguments.oldest, OLDEST_ARCHITECTURES, everything)]
    )
    broken, count = uncovered(ledger, kernels_in_sources()), 0
    for version, by_arch in ledger.items():
        for arch, entries in by_arch.items():
            count += len(entries)
            broken += [f"{version} {line}" for line in violations(arch, entries)]
            for line in differences(arch, before.get(version, {}).get(arch, {}), entries):
                print(version, line)
    write(ledger)
    print(f"recorded {LEDGER.relative_to(tool.ROOT)}: {count} entries")
    if broken:
        print("\nNot allowed, recorded or not:", *broken, sep="\n  ")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
