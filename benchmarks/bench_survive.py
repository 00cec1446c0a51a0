"""Measure what int4 gives back of a forgotten text, with `survive: int4` and without, on tiny models trained here.

    python -m benchmarks.bench_survive                   ten seeds; if killed, it goes on with the next one
    python -m benchmarks.bench_survive --seeds 0         the seed on which the recipe was chosen

A seed draws documents and first weights. Its model learns forget and retain documents by heart and is unlearned once;
then the model as trained, and the same after `survive.hold`, are measured as they are and with their weights rounded to
nearest, as the audit's attack does. What counts is how far rounding takes a model from the unlearned one: the forget
rows' NLL, which int4 should leave where unlearning has brought it, and the NLL of retain rows that unlearning did not
see.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

from benchmarks import survive_table
from benchmarks.journal import Journal, of_kind, read
from moe_unlearn import data, metrics, survive
from moe_unlearn.audit.weights import restored
from moe_unlearn.benchmark import tiny_models
from moe_unlearn.config import Recipe
from moe_unlearn.model.grids import Grid, linear_weights
from moe_unlearn.step import UnlearnStep

SEEDS = range(1, 11)  # 0 is the seed on which the recipe below was chosen
SETTINGS = tiny_models.Settings(
    forget=10, retain=20, holdout=4, unlearn_share=0.5, max_length=24, vocab_size=384, hidden_size=48,
    intermediate_size=24, layers=2, experts=8, top_k=2, epochs=60, lr=8e-3, batch_size=15,
)  # fmt: skip
RECIPE = {
    "forget": {"objective": "uce"},
    "retain": {"objective": "kl", "alpha": 2.0},
    "optimizer": {"lr": 1e-3},
    "survive": "int4",
}
STEPS, LEVEL = 120, 4.0  # a run ends where the forget rows' NLL reaches the level


class Measure:
    """Measures the NLL of the forget rows, and of the retain rows that unlearning saw and did not see."""

    def __init__(self, **sides: list[data.Example]):
        self.sides = sides

    def of(self, model: nn.Module) -> dict[str, float]:
        """Measure a model as it is."""
        return {side: metrics.nll(metrics.token_scores(model, examples)) for side, examples in self.sides.items()}

    def rounded(self, model: nn.Module, grid: Grid) -> dict[str, float]:
        """Measure a model with the weights that a grid has; it is left as it was."""
        weights = linear_weights(model).values()
        with restored(weight for weight, _ in weights), torch.no_grad():
            for weight, inputs in weights:
                weight.copy_(grid.rounded(weight, inputs))
            return self.of(model)


def of_seed(seed: int) -> dict[str, dict[str, float]]:
    """Train and unlearn one model and measure it: as trained and held, each as it is and rounded."""
    tokenizer, forget, retain, _ = tiny_models.build_data("builtin:pydoc", seed, SETTINGS)
    model = tiny_models.tiny_olmoe(len(tokenizer), seed, SETTINGS)
    tiny_models.train(
        model,
        forget + retain,
        epochs=SETTINGS.epochs,
        lr=SETTINGS.lr,
        batch_size=SETTINGS.batch_size,
        seed=seed,
        pad_id=tokenizer.pad_token_id,
        name=f"seed {seed}",
    )
    cut = round(SETTINGS.unlearn_share * len(retain))
    measure = Measure(forget=forget, seen=retain[:cut], unseen=retain[cut:])
    recipe = Recipe.from_dict(RECIPE | {"seed": seed})
    assert recipe.survive is not None
    grid = survive.grid_of(recipe.survive)
    sides = [data.batches(rows, len(rows)) for rows in (forget, retain[:cut])]
    found, step = {"learned": measure.of(model)}, UnlearnStep(model, recipe)
    step.prepare(*sides)
    while step.steps < STEPS and not (step.steps % 3 == 0 and _depth(model, forget) >= LEVEL):
        step(sides[0][0], sides[1][0])
    model.eval()
    found["plain"], found["plain, rounded"] = measure.of(model), measure.rounded(model, grid)
    moved = survive.hold(model, grid, *sides, step.masks)
    found["held"], found["held, rounded"] = measure.of(model), measure.rounded(model, grid)
    found["moved"] = {**moved._asdict(), "steps": step.steps}
    step.close()
    return found


def _depth(model: nn.Module, forget: list[data.Example]) -> float:
    return metrics.nll(metrics.token_scores(model, forget))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_survive", description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[*SEEDS])
    parser.add_argument("--out", type=Path, default=survive_table.FILE)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    known = of_kind(read(given.out), "seed") if given.out.exists() else []
    for seed in given.seeds:
        if seed not in {row["seed"] for row in known}:
            row = {"seed": seed, "found": of_seed(seed)}
            Journal(given.out).write("seed", **row)
            known.append(row)
    print(survive_table.table([row for row in known if row["seed"] in given.seeds]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
