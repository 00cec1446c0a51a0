"""The rows that a run takes of its sets, and those that training does not see, on which the report measures utility."""

import sys

from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn import data
from moe_unlearn.cli.arguments import examples_of
from moe_unlearn.config import Recipe
from moe_unlearn.data import DataReport

NAME = "retain_eval"


def take_rows(
    recipe: Recipe, tokenizer: Tokenizer, sets: dict, reports: dict[str, DataReport], cache: str | None
) -> None:
    """Hold out what `data.retain_eval` says as a set of that name, then draw `forget_rows` and `retain_rows`.

    `sets` have examples by side, and `reports` get the number of rows. Raises ValueError for rows that stand in two
    sets.
    """
    data.check_apart(sets["forget"], sets["retain"])
    _hold_out(recipe, tokenizer, sets, reports, cache)
    for side, rows in (("forget", recipe.data.forget_rows), ("retain", recipe.data.retain_rows)):
        reports[side].rows = len(sets[side])
        if rows is not None and rows < len(sets[side]):
            print(f"{side}: {rows:,} of {len(sets[side]):,} rows are drawn, data.{side}_rows", file=sys.stderr)
            sets[side] = data.draw(sets[side], rows, seed=recipe.seed)
            reports[side].rows = rows


def _hold_out(
    recipe: Recipe, tokenizer: Tokenizer, sets: dict, reports: dict[str, DataReport], cache: str | None
) -> None:
    """Add the set of rows that training does not see, if there are any; a share of the retain set leaves it.

    Of more rows than `data.retain_rows`, that many are drawn.
    """
    wanted, all_rows = recipe.data.retain_eval, len(sets["retain"])
    if isinstance(wanted, str):
        own: dict[str, DataReport] = {}
        held_out = examples_of(wanted, tokenizer, recipe.data, "retain", own, cache=cache)
        data.check_held_out(held_out, sets["forget"], sets["retain"])
        reports[NAME], said = own["retain"], f"retain: {len(held_out):,} rows for the report are of {wanted}"
    else:
        sets["retain"], held_out = data.hold_out(sets["retain"], wanted, seed=recipe.seed)
        if not held_out:
            return
        documents = sum(not example.continues for example in held_out)
        reports[NAME] = DataReport(f"{wanted:g} of {reports['retain'].source}", read=documents, kept=documents)
        said = f"retain: {len(held_out):,} of {all_rows:,} rows are held out for the report"
    print(f"{said}, data.{NAME}", file=sys.stderr)
    sets[NAME] = data.draw(held_out, recipe.data.retain_rows, seed=recipe.seed)
    reports[NAME].rows = len(sets[NAME])
