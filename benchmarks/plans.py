"""Plan every shipped recipe for every known model, from configs alone, and write the page: python -m benchmarks.plans

    python -m benchmarks.plans                         what results/plans.json lacks; moe_unlearn/plan/MODELS.md
    python -m benchmarks.plans --models olmoe-1b-7b    of these models alone
    python -m benchmarks.plans --again                 all of it anew

Recipes that differ only in what no size depends on (`sizes`) are planned once. Those of one structure whose plans agree
within 0.1 GiB in each component, and in whether devices are enough, stand in one row: that of the largest, for which
what makes it fit is searched. The record is written after each row, so that a run that is stopped goes on. Plans are
those of the CPU's kernels with one thread, for the same page on any machine.
"""

import argparse
import gc
import json
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from benchmarks.stamp import RESULTS, ROOT
from moe_unlearn.config import Recipe, models, shipped
from moe_unlearn.files import write_json, write_text
from moe_unlearn.model.loading import meta_model
from moe_unlearn.plan import Plan
from moe_unlearn.plan.advice import Unloaded, add_remedies
from moe_unlearn.plan.knobs import Search
from moe_unlearn.runs.planning import SIZES
from moe_unlearn.step import UnlearnStep

RECORD = RESULTS / "plans.json"
PAGE = ROOT / "moe_unlearn" / "plan" / "MODELS.md"
GIB = 2**30
_ALIKE = 0.1 * GIB
# keys on whose value no size depends, beside those with fractions
_NO_SIZE = {
    "name", "seed", "steps", "forget.replacement", "forget.ignore_first_n_answer_tokens", "wagle.accumulation",
    "dual.warmup_steps", "optimizer.warmup_steps", "data.prompt_tokens",
}  # fmt: skip
_SIZE = {"retain_per_forget", "wagle.memory"}  # keys with fractions on which one does
_COLUMNS = {"weights": "weights", "optimizer state": "state", "gradients": "gradients", "activations": "activations"}
_TOP = "experts of the top quarter of the layers"
_HEAD = """# Plans of published models

`python -m benchmarks.plans` writes this page: what `moe-unlearn run RECIPE --model-config MODEL --dry-run` says of each
shipped recipe, from the model's config alone, without weights or data. Batches are those of the recipe: rows times
`data.max_length` tokens. Sizes are in GiB and predicted; kernels and threads are those of a CPU with one thread.
Recipes whose plans agree within 0.1 GiB in each component stand in one row, that of the largest.

The first columns are a step's peak and what is held at that moment; *mask* is the peak while WAGLE's mask is made on a
device of 80 GiB. Behind *no* stands what makes the run fit, [cheapest first](README.md#where-it-does-not-fit), found by
planning with it; `--mesh` are several devices of that size. Where nothing stands behind it, nobody has searched."""


def sizes(recipe: Recipe) -> dict[str, Any]:
    """Return what sizes depend on in a recipe, by full key; of a fraction whether it is 0."""
    found = {}
    for key, value in _flat(recipe.to_dict()):
        rows = key in ("data.forget_rows", "data.retain_rows") and recipe.trace is None
        if key not in _NO_SIZE and not rows:
            found[key] = bool(value) if isinstance(value, float) and key not in _SIZE else value
    return found


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{key}.")
        elif isinstance(value, list):
            yield f"{path}{key}", str(value) if path + key == "scope.parameters" else len(value)
        else:
            yield f"{path}{key}", value


def searches(model: str, names: Iterable[str]) -> dict[tuple[str, ...], Search]:
    """Return the search for each kind of recipe, by the names of the recipes of that kind."""
    kinds: dict[str, list[str]] = {}
    recipes = {name: Recipe.load(name, model=model) for name in names}
    for name, recipe in recipes.items():
        kinds.setdefault(str(sizes(recipe)), []).append(name)
    unloaded = Unloaded(partial(meta_model, model), UnlearnStep, fits=SIZES)
    return {tuple(kind): unloaded.search(recipes[kind[0]]) for kind in kinds.values()}


def rows(model: str, names: Iterable[str]) -> list[dict[str, Any]]:
    """Plan the recipes for a model; return a row for all that are alike, in the order of the names."""
    order, made = [*names], []
    with _one_thread():
        planned = [(kind, search.recipe, search.plan()) for kind, search in searches(model, order).items()]
    planned.sort(key=lambda found: _structure(found[1]))
    for _, alike in groupby(planned, key=lambda found: _structure(found[1])):
        left = sorted(alike, key=lambda found: -found[2].peak)
        while left:
            plan = left[0][2]
            same = [found for found in left if _agree(plan, found[2])]
            left = [found for found in left if found not in same]
            recipes = sorted((name for kind, *_ in same for name in kind), key=order.index)
            made.append({"recipes": recipes, "of": same[0][0][0], **_cells(plan)})
    return sorted(made, key=lambda row: order.index(row["recipes"][0]))


def remedies(model: str, row: Mapping[str, Any]) -> dict[str, list[str]]:
    """Search for what makes the recipe of a row fit the devices on which it does not."""
    with _one_thread():
        ((_, search),) = searches(model, [row["of"]]).items()
        plan = search.plan()
        add_remedies(plan, search)
    return {f"{size:g}": lines for size, lines in plan.remedies.items()}


def _structure(recipe: Recipe) -> str:
    """Return what recipes in one row have in common: all but the forget objective."""
    return str({key: value for key, value in sizes(recipe).items() if not key.startswith(("forget.", "dual"))})


def _agree(plan: Plan, other: Plan) -> bool:
    """Return whether two plans agree in what the page shows of them."""
    pairs = [(plan.memory, other.memory), *((plan.on(size), other.on(size)) for size in SIZES)]
    near = all(abs(a.get(key, 0) - b.get(key, 0)) <= _ALIKE for a, b in pairs for key in {*a, *b})
    near = near and all(abs(sum(a.values()) - sum(b.values())) <= _ALIKE for a, b in pairs)
    return near and all(plan.fits_on(size) == other.fits_on(size) for size in SIZES)


def _cells(plan: Plan) -> dict[str, Any]:
    return {
        "memory": plan.memory,
        "on": {f"{size:g}": sum(plan.on(size).values()) for size in SIZES},
        "masking": {f"{size:g}": plan.masking(size) for size in SIZES},
        "fits": {f"{size:g}": plan.fits_on(size) for size in SIZES},
        "remedies": {} if all(map(plan.fits_on, SIZES)) else None,
        "not planned": [note for note in plan.notes if "not rehearsed" in note],
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def page(record: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the page of a record."""
    names = [*_COLUMNS.values(), "rest", "mask", *(f"one {size:g} GiB" for size in SIZES)]
    head = f"| recipes | peak | {' | '.join(names)} |\n|{'---|' * (len(names) + 2)}"
    parts = [_HEAD]
    for model in record:
        parts += [f"## {model}", "\n".join([head, *map(_line, record[model])])]
    return "\n\n".join(parts) + "\n"


def _line(row: Mapping[str, Any]) -> str:
    memory = row["memory"]
    rest = sum(size for name, size in memory.items() if name not in _COLUMNS)
    mask = row["on"]["80"] if row["masking"]["80"] else 0
    numbers = [sum(memory.values()), *(memory.get(name, 0) for name in _COLUMNS), rest, mask]
    answers = [_answer(row, f"{size:g}") for size in SIZES]
    recipes = ", ".join(f"`{name}`" for name in row["recipes"])
    return f"| {' | '.join([recipes, *(f'{size / GIB:.1f}' if size else '' for size in numbers), *answers])} |"


def _answer(row: Mapping[str, Any], size: str) -> str:
    if row["fits"][size]:
        return "yes"
    if row["remedies"] is None:
        return "no"
    ways = [way for line in row["remedies"][size] if (way := _way(line))]
    return f"no: {'; or '.join(ways)}" if ways else "no, with no option"


def _way(line: str) -> str:
    """Return the options that a line of `Search.remedies` names, as the page has them; empty if it names none."""
    words = shlex.split(line)
    ranks = [f"`--mesh {words[words.index('--mesh') + 1]}`"] if "--mesh" in words else []
    overrides = words[words.index("--set") + 1 :] if "--set" in words else []
    top = [_TOP] if any(text.startswith("scope.parameters=") for text in overrides) else []
    named = [f"`{text}`" for text in overrides if not top or not text.startswith("scope.")]
    return ", ".join([*ranks, *named, *top])


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan what is not recorded, and write the record and the page after each part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=models(), default=models())
    parser.add_argument("--again", action="store_true", help="plan what is recorded too")
    options = parser.parse_args(arguments)
    if torch.cuda.is_available():
        parser.error("the page is planned for a CPU, and there is a GPU: hide it with CUDA_VISIBLE_DEVICES=")
    record = recorded()

    def write() -> None:
        kept = {name: record[name] for name in models() if name in record}
        write_json(RECORD, kept)
        write_text(PAGE, page(kept))
        gc.collect()  # rehearsals leave cycles

    for model in options.models:
        known = [] if options.again else record.get(model, [])
        named = {name for row in known for name in row["recipes"]}
        if lacking := [name for name in shipped() if name not in named]:
            found = [*known, *rows(model, lacking)]
            record[model] = sorted(found, key=lambda row: shipped().index(row["recipes"][0]))
            write()
            print(f"{model}: {len(record[model])} rows", flush=True)
    for model in options.models:
        for row in record[model]:
            if row["remedies"] is None:
                row["remedies"] = remedies(model, row)
                write()
                print(f"{model}, {row['of']}: {row['remedies']}", flush=True)
    write()
    return 0


def recorded(path: Path = RECORD) -> dict[str, Any]:
    """Return the record; empty where there is none."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


if __name__ == "__main__":
    sys.exit(main())
