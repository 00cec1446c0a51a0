"""Texts that a model itself writes, which protect what it knows and the retain set does not show."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn import metrics
from moe_unlearn.config import Recipe
from moe_unlearn.data import Example
from moe_unlearn.data.corpus import runs as runs_of
from moe_unlearn.files import read_sealed, write_sealed
from moe_unlearn.ranks import gathered, is_first
from moe_unlearn.runs.names import SAMPLED

SHARED = 8  # tokens in a row that a text may not share with a forget row
TURNS = 8  # in which texts are written, until there are enough that may stay


def own_texts(
    model: nn.Module,
    tokenizer: Tokenizer,
    recipe: Recipe,
    forget: Sequence[Example],
    folder: Path | None = None,
) -> list[Example]:
    """Return `data.sampled` rows that the model writes at temperature 1, without those that repeat a forget row.

    A text begins with the tokenizer's token for the begin of a text, or else for its end, and has at most
    `data.max_length` tokens; its end is a token of the row. It repeats a forget row if both have the same `SHARED`
    tokens one after the other. Warns where after `TURNS` turns there are fewer texts than asked for. Deterministic for
    a seed, up to the rounding of the model's dtype; ranks write together. Raises ValueError without such a token.

    `folder` is that of a run that goes on: the texts that it has kept (`keep`) are returned, whatever the model.
    Damaged ones are written again, with a warning.
    """
    if not recipe.data.sampled:
        return []
    kept = None if folder is None else gathered(lambda: _kept(folder) if is_first() else None, lambda ids: ids)[1][0]
    texts = _written(model, tokenizer, recipe, forget) if kept is None else kept
    return [Example(ids, list(ids), 0) for ids in texts]


def keep(folder: Path, rows: Sequence[Example]) -> None:
    """Write the texts of a run, if it has any, into its folder, where a resume finds them."""
    if rows:
        write_sealed(folder / SAMPLED, json.dumps([row.input_ids for row in rows]).encode())


def _kept(folder: Path) -> list[list[int]] | None:
    path = folder / SAMPLED
    if not path.exists():
        return None
    try:
        found: list[list[int]] = json.loads(read_sealed(path))
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} is damaged ({error}); the model writes the texts again", stacklevel=3)
        return None
    return found


def _written(model: nn.Module, tokenizer: Tokenizer, recipe: Recipe, forget: Sequence[Example]) -> list[list[int]]:
    """Return the tokens of as many texts as are asked for, or of all that are left after `TURNS` turns."""
    count, end = recipe.data.sampled, tokenizer.eos_token_id
    begin = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if begin is None:
        raise ValueError(
            "data.sampled needs a tokenizer with a bos_token or an eos_token, with which the model's texts begin; this "
            "one has neither: add one to its folder, or leave data.sampled out"
        )
    length = min(recipe.data.max_length, metrics.context_length(model) or recipe.data.max_length)
    stop = () if end is None else (end,)
    taken = set().union(*(runs_of(row.input_ids, SHARED) for row in forget))
    found: list[list[int]] = []
    asked = 0
    for turn in range(TURNS):
        # twice what is missing, since some of it will repeat a forget row too
        more = min(count, 2 * (count - len(found)))
        asked += more
        for tokens in metrics.sampled(model, [[begin]] * more, length - 1, seed=recipe.seed + turn, stop=stop):
            ids = [begin, *tokens, *stop][:length]
            if len(tokens) > 1 and taken.isdisjoint(runs_of(ids, SHARED)):
                found.append(ids)
        if len(found) >= count:
            break
    if len(found) < count and is_first():
        warnings.warn(
            f"data.sampled asks for {count:,} texts; of {asked:,} that the model wrote {len(found):,} repeat no forget "
            "row, and these are taken",
            stacklevel=3,
        )
    return found[:count]


def assumed(recipe: Recipe) -> list[Example]:
    """Return `data.sampled` rows at their longest, for a plan, which has no model that writes."""
    ids = [0] * recipe.data.max_length
    return [Example(ids, ids, 0)] * recipe.data.sampled
