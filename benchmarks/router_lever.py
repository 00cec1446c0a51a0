"""Measure what the router lever does on the demo's tiny models: python -m benchmarks.router_lever --out FILE.jsonl

Each recipe unlearns with routers free, frozen and invariant, from the same model and rows. Recorded are the share of
retain tokens that keep their experts (of rows that unlearning sees, and of others), metrics of both sides, and what the
routing attack of an audit brings back: the nats a token by which former routers, and former routes token by token,
raise the log-likelihood of the forget documents. A run that is stopped goes on where it was; `--record` writes
benchmarks/results/router.json from the journal; `router_table` makes the section of RESULTS.md of it.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import journal, stamp
from benchmarks.router_table import ATTACKS, FILE, RECIPES
from moe_unlearn import data, routers
from moe_unlearn.audit.attack import Settings, Target, mean
from moe_unlearn.audit.routing import ATTACK as ROUTING
from moe_unlearn.benchmark import tiny_models
from moe_unlearn.benchmark.demo import demo_recipe
from moe_unlearn.benchmark.suite import Progress, unlearning
from moe_unlearn.files import write_json
from moe_unlearn.metrics import routing as metrics

MODES = {
    "free": "{mode: free}",
    "invariant": "{mode: invariant}",
    "frozen": "{mode: frozen}",
    "invariant, refreshed": "{mode: invariant, stability_every: 5, refresh_below: 0.99}",
}
METRICS = ("nll_f", "nll_r", "verbmem_f", "verbmem_r", "knowmem_f", "knowmem_r")
_MEASURED = ("nll", "verbmem", "knowmem")


def measure(recipe: str, mode: str, seed: int) -> dict[str, Any]:
    """Unlearn once on the models of a seed and return the row of the record."""
    made = tiny_models.prepare_experiment(seed=seed)
    rows = {"seen": made.retain_unlearn, "unseen": made.retain_eval}
    pad = data.pad_token_id(made.tokenizer)
    batches = {name: list(data.batches(own, 64, pad_id=pad)) for name, own in rows.items()}
    before = {name: routers.routes(made.target, own) for name, own in batches.items()}
    found: dict[str, Any] = {"recipe": recipe, "mode": mode, "seed": seed}

    def watch(progress: Progress) -> None:
        if not progress.last:
            return
        step = progress.unlearn_step
        model = step.model.eval()
        found["steps"] = progress.step
        for name, own in batches.items():
            found[f"stability_{name}"] = routers.stability(before[name], routers.routes(model, own))
        if step.prepared.routers:
            kept = list(step.prepared.routers.values())
            found["directions"] = sum(float(k.basis.square().sum()) for k in kept) / sum(len(k.weight) for k in kept)
            found["closed"] = sum(int(k.closed.sum()) for k in kept)
        sides = {"forget": made.forget, "retain": made.retain_eval[: len(made.forget)]}
        former = {side: metrics.routes(made.target, own) for side, own in sides.items()}
        target = Target(
            model=model,
            tokenizer=made.tokenizer,
            rows=sides,
            before=made.target,
            settings=Settings(experts=8),
            routes=former,
            batch_size=64,
        )
        plain, variants = mean(target.read()["loglik"]["forget"]), ROUTING.run(target).variants
        for name, of in ATTACKS.items():
            found[f"{of} bring back"] = mean(variants[name].scores["loglik"]["forget"]) - plain

    start = time.process_time()
    table = unlearning(
        made.fresh_target,
        made.forget,
        made.retain_unlearn,
        [demo_recipe(recipe, seed, f"router={MODES[mode]}")],
        list(_MEASURED),
        tokenizer=made.tokenizer,
        evaluation={"retain": made.retain_eval},
        baselines={},
        seeds=[seed],
        on_step=watch,
    )
    values = table.results[seed]
    found |= {name: values[recipe][name] for name in METRICS if name in values[recipe]}
    return found | {"processor_seconds": time.process_time() - start}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the journal, which a later call continues")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument(
        "--record", action="store_true", help="measure nothing more; write the record of what the journal has"
    )
    chosen = parser.parse_args(arguments)
    known = journal.read(chosen.out) if chosen.out.exists() else []
    rows = {(line["row"]["recipe"], line["row"]["mode"], line["row"]["seed"]): line["row"] for line in known
            if line["kind"] == "case"}  # fmt: skip
    for recipe in RECIPES:
        for mode in MODES:
            if (recipe, mode, chosen.seed) not in rows and not chosen.record:
                rows[recipe, mode, chosen.seed] = made = measure(recipe, mode, chosen.seed)
                journal.Journal(chosen.out, "router").write("case", row=made)
                print(json.dumps(made), flush=True)
    if chosen.record:
        write_json(stamp.RESULTS / FILE, {"stamp": stamp.stamp(), "rows": list(rows.values())})
    return 0


if __name__ == "__main__":
    sys.exit(main())
