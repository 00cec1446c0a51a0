"""Makes pairs of rows and their collator as a recipe asks for them."""

from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn.config import NEED_REFUSALS, NEED_UNSEEN, Recipe
from moe_unlearn.data.packing import check_packing
from moe_unlearn.data.pairs import (
    ForgetRetainDataset,
    PairCollator,
    alternates,
    check_apart,
    check_unseen,
    dealt,
    draw,
    refusals,
)
from moe_unlearn.data.rows import check_rows, encode_side
from moe_unlearn.data.tokenize import Example, pad_token_id


def pair_collator(
    recipe: Recipe,
    tokenizer: Tokenizer | None,
    forget: Sequence[Example],
    model: nn.Module | None,
    unseen: Sequence[Example] | None = None,
) -> PairCollator:
    """Make the collator for pairs of `forget` examples, with the companions that the objective needs.

    These are refusals, alternates, or `unseen` texts, of which each comes as often as another, or once more. Raises
    ValueError if refusals need a `tokenizer` and there is none, if an example has no prompt to refuse or no alternate,
    for an objective without the unseen texts that it needs, and for `data.packing` with a `model` that mixes packed
    examples; a plan that has no model gives None.
    """
    pad_id = 0 if tokenizer is None else pad_token_id(tokenizer)
    packing = recipe.data.max_length if recipe.data.packing else None
    if packing is not None and model is not None:
        check_packing(model, rows=2)
    if recipe.forget.objective in NEED_UNSEEN:
        if not unseen:
            raise ValueError(
                f"forget.objective {recipe.forget.objective!r} needs texts like the forget set's that the model never "
                "saw: give --unseen, data.unseen, or `unseen` beside forget and retain"
            )
        return PairCollator(pad_id, dealt(unseen, len(forget), seed=recipe.seed), packing=packing)
    if recipe.forget.objective not in NEED_REFUSALS:
        return PairCollator(pad_id, packing=packing)
    if recipe.forget.replacement == "alternate":
        return PairCollator(pad_id, alternates(forget), packing=packing)
    if tokenizer is None:
        raise ValueError(
            f"forget.objective {recipe.forget.objective!r} needs processing_class, a tokenizer, for its refusals"
        )
    return PairCollator(pad_id, refusals(forget, tokenizer, seed=recipe.seed), packing=packing)


def paired(rows: Mapping, recipe: Recipe, tokenizer: Tokenizer | None) -> ForgetRetainDataset:
    """Return the pairs of two sets of rows, encoded and drawn as the recipe's data section says."""
    settings, sides = recipe.data, {}
    if rows.keys() - {"unseen"} != {"forget", "retain"}:
        raise ValueError(
            "expected train_dataset to have forget and retain, and perhaps unseen; got "
            f"{', '.join(map(str, rows)) or 'none'}"
        )
    if tokenizer is None:
        raise ValueError("rows need processing_class, a tokenizer, to be encoded")
    for side, own in rows.items():
        check_rows(side, own)
        replaced = recipe.forget.replacement == "alternate"
        sides[side] = encode_side(own, tokenizer, settings, side=side, alternates=replaced)
    check_apart(sides["forget"], sides["retain"])
    check_unseen(sides)
    forget = draw(sides["forget"], settings.forget_rows, seed=recipe.seed)
    retain = draw(sides["retain"], settings.retain_rows, seed=recipe.seed)
    return ForgetRetainDataset(
        forget,
        retain,
        unseen=sides.get("unseen"),
        seed=recipe.seed,
        retain_per_forget=recipe.retain_per_forget,
    )
