"""Says what of this checkout a GPU would find, without one: `python -m tests.gpu_load` prints a line for each fault.

Both libraries load; each op that the table of ops gives a CUDA kernel has one, and the other ops have none; each name
that a file of csrc/cuda implements is known to torch's dispatcher for CUDA; every Triton kernel can be imported.
"""

import itertools
import re
import sys
from pathlib import Path

import torch

import moe_unlearn.ops  # noqa: F401 -- registers
from moe_unlearn import backend, native

ROOT = Path(__file__).resolve().parent.parent
PAGE = Path("moe_unlearn", "ops", "README.md")
_NONE = "–"


def ops_table(text: str) -> dict[str, dict[str, str]]:
    """Return {op: {column: cell}} of the table in the README of the ops."""
    head, _, *rows = text[text.index("| op | computes |") :].splitlines()
    columns = [cell.strip() for cell in head.strip("|").split("|")]
    table = {}
    for row in itertools.takewhile(lambda line: line.startswith("|"), rows):
        op, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        table[op.strip("`")] = dict(zip(columns[1:], cells, strict=True))
    return table


def implemented(folder: Path) -> list[str]:
    """The names that the CUDA sources register with torch."""
    sources = sorted((folder / "csrc" / "cuda").glob("*.cu"))
    return [name for path in sources for name in re.findall(r'm\.impl\("(\w+)"', path.read_text(encoding="utf-8"))]


def registered_for_cuda(name: str) -> bool:
    """Whether torch's dispatcher has a CUDA kernel of the native op."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"moe_unlearn_native::{name}", "CUDA")


def faults(table: dict[str, dict[str, str]], names: list[str]) -> list[str]:
    """A line for everything that is not as it must be on a GPU machine."""
    found = [f"native library {line}" for line in native.report() if ": built" not in line]
    found += [
        f"{impl} is not usable for {', '.join(of)}: {why}" for (impl, why), of in backend.unusable("cuda").items()
    ]
    usable = {name: backend.available(name, "cuda") for name in backend.registered()}
    known = {name.partition(".")[0] for name in usable}
    found += [f"{op} stands in the table of ops or is registered, not both" for op in sorted(known ^ set(table))]
    for op, cells in table.items():
        for impl in ("triton", "cuda"):
            there = any(impl in of for name, of in usable.items() if name.partition(".")[0] == op)
            if there != (cells[impl] != _NONE):
                found.append(f"{op} has {'a' if there else 'no'} {impl} kernel; the table of ops says {cells[impl]}")
    if not native.load("cuda"):
        found += [f"{name} is not registered for CUDA" for name in names if not registered_for_cuda(name)]
    return found


def promised(root: Path = ROOT) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The table of ops, and the names that the CUDA sources register."""
    return ops_table((root / PAGE).read_text(encoding="utf-8")), implemented(root)


def main() -> int:
    table, names = promised()
    found = faults(table, names)
    print(*native.report(), f"{len(names)} native ops for CUDA, {len(table)} ops in the table of ops", *found, sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
