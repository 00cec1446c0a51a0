"""`make ledger`: compile every kernel of ours for every architecture, record the figures and say what got worse.

Recorded are all architectures for the compilers that are here, and sm_90 for the oldest supported Triton.
"""

import argparse
import ast
import sys
from pathlib import Path

from moe_unlearn.regress import ledger, static

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "triton_kernels"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
OLDEST = "3.6.0"
OLDEST_FOLDER = ROOT / ".venv" / f"triton-{OLDEST}"
OLDEST_ARCHITECTURES = ("sm_90",)
CACHE = ROOT / "build" / "triton-cache"


def uncovered(recorded: ledger.Ledger, kernels: set[str]) -> list[str]:
    """Triton kernels of the sources without an entry, entries without a kernel. A name is file/kernel/case."""
    entries = {
        "/".join(name.split("/")[:2])
        for compiler, by_arch in recorded.items()
        if compiler.startswith("triton")
        for of_arch in by_arch.values()
        for name in of_arch
    }
    found = [f"{kernel}: in the sources, never in the ledger" for kernel in kernels - entries]
    return sorted(found + [f"{kernel}: in the ledger, not in the sources" for kernel in entries - kernels])


def kernels_in_sources() -> set[str]:
    """ "file/_name_kernel" of every kernel in triton_kernels/."""
    return {
        f"{path.stem}/{node.name}"
        for path in KERNELS.glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("_") and node.name.endswith("_kernel")
        if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Record the shipped ledger anew and say what changed.")
    parser.add_argument("--oldest", type=Path, default=OLDEST_FOLDER, help=f"the folder that holds Triton {OLDEST}")
    parser.add_argument("--everything", action="store_true", help="also what has not changed since it was recorded")
    options = parser.parse_args()
    common = {"everything": options.everything, "cache_folder": CACHE}
    reports = [
        static.record(ARCHITECTURES, **common),
        static.record(OLDEST_ARCHITECTURES, compilers=["triton"], triton_folder=options.oldest, **common),
    ]
    for report in reports:
        print(*report.notes, sep="\n")
    broken = [line for report in reports for line in report.problems]
    current = {compiler for report in reports for compiler in report.measured}
    kinds = {compiler.split()[0] for compiler in current}
    # no figures of compilers that nothing is compared with any more
    kept = {c: by_arch for c, by_arch in ledger.read().items() if c in current or c.split()[0] not in kinds}
    broken += uncovered(kept, kernels_in_sources())
    if not broken:
        ledger.write(kept)
    print(f"{ledger.SHIPPED.relative_to(ROOT)}:", *(report.summary() for report in reports), sep="\n  ")
    if broken:
        print("\nNot allowed, recorded or not:", *broken, sep="\n  ")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
