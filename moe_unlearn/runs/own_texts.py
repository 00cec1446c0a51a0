"""Texts that a model itself writes, which protect what it knows and the retain set does not show."""

import warnings
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn import metrics
from moe_unlearn.config import Recipe
from moe_unlearn.data import Example
from moe_unlearn.data.corpus import runs as runs_of
from moe_unlearn.ranks import is_first

SHARED = 8  # tokens in a row that a text may not share with a forget row
TURNS = 8  # in which so many texts are written as are asked for, until there are enough that may stay


def own_texts(model: nn.Module, tokenizer: Tokenizer, recipe: Recipe, forget: Sequence[Example]) -> list[Example]:
    """Return `data.sampled` rows that the model writes at temperature 1, without those that repeat a forget row.

    A text begins with the tokenizer's token for the begin of a text, or else for its end, and has at most
    `data.max_length` tokens; its end is a token of the row. It repeats a forget row if both have the same `SHARED`
    tokens one after the other. Warns where after `TURNS` turns there are fewer texts than asked for. Deterministic for
    a seed, up to the rounding of the model's dtype; ranks write together. Raises ValueError without such a token.
    """
    count, end = recipe.data.sampled, tokenizer.eos_token_id
    if not count:
        return []
    begin = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if begin is None:
        raise ValueError(
            "data.sampled needs a tokenizer with a bos_token or an eos_token, with which the model's texts begin; this "
            "one has neither: add one to its folder, or leave data.sampled out"
        )
    length = min(recipe.data.max_length, metrics.context_length(model) or recipe.data.max_length)
    stop = () if end is None else (end,)
    taken = set().union(*(runs_of(row.input_ids, SHARED) for row in forget))
    found: list[Example] = []
    for turn in range(TURNS):
        written = metrics.sampled(model, [[begin]] * count, length - 1, seed=recipe.seed + turn, stop=stop)
        for tokens in written:
            ids = [begin, *tokens, *stop][:length]
            if len(tokens) > 1 and taken.isdisjoint(runs_of(ids, SHARED)):
                found.append(Example(ids, list(ids), 0))
        if len(found) >= count:
            break
    if len(found) < count and is_first():
        warnings.warn(
            f"data.sampled asks for {count:,} texts; of {TURNS * count:,} that the model wrote {len(found):,} repeat "
            "no forget row, and these are taken",
            stacklevel=2,
        )
    return found[:count]


def assumed(recipe: Recipe) -> list[Example]:
    """Return `data.sampled` rows at their longest, for a plan, which has no model that writes."""
    ids = [0] * recipe.data.max_length
    return [Example(ids, ids, 0)] * recipe.data.sampled
