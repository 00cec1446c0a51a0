"""The section of RESULTS.md on the router lever, from the record of `benchmarks.router_lever`."""

import json
from pathlib import Path

from benchmarks.stamp import RESULTS

FILE = "router.json"
RECIPES = ("mollm", "combined")
ATTACKS = {"router back": "former routers", "routes forced": "former routes"}


def table(results: Path = RESULTS) -> str:
    """Return the section of RESULTS.md, from the record if there is one."""
    path = results / FILE
    if not path.exists():
        return "No run is recorded yet."
    run = json.loads(path.read_text(encoding="utf-8"))
    where = run["stamp"]
    lines = [
        f"`python -m benchmarks.router_lever` on the demo's tiny models, seed {run['rows'][0]['seed']}, torch "
        f"{where['versions']['torch']}, commit {(where['commit'] or 'unknown')[:9]} (`benchmarks/results/{FILE}`). "
        "Routing stability is the share of retain tokens, over all layers, whose set of experts is that of the model "
        "before; of rows that unlearning saw, and of others. What former routers and former routes bring back is in "
        "nats a token of the forget documents.",
        "",
        "| recipe | routers | stability, seen | unseen | VerbMem forget | retain | KnowMem forget | retain | "
        "routers bring back | routes bring back |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(run["rows"], key=lambda row: RECIPES.index(row["recipe"])):
        cells = [f"{100 * row[f'stability_{name}']:.1f} %" for name in ("seen", "unseen")]
        cells += [f"{row[name]:.3f}" for name in ("verbmem_f", "verbmem_r", "knowmem_f", "knowmem_r")]
        cells += [f"{row[f'{of} bring back']:+.3f}" for of in ATTACKS.values()]
        lines.append(f"| {row['recipe']} | {row['mode']} | {' | '.join(cells)} |")
    return "\n".join(lines)
