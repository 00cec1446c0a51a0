"""What `moe-unlearn run` makes of its options for adapters, which the recipe's section `adapter` describes."""

import argparse
import dataclasses

from moe_unlearn.config import Recipe
from moe_unlearn.config.adapter import bits_of
from moe_unlearn.model.adapters import check_peft
from moe_unlearn.model.loading import Loading, is_adapter, stored_as
from moe_unlearn.plan import Mesh


def overrides(options: argparse.Namespace) -> list[str]:
    """Return `--adapter` as overrides of the recipe; ValueError for what is no list of KEY=VALUE."""
    given = [] if options.adapter is None else options.adapter.split(",")
    for part in given:
        if not all(part.partition("=")):
            raise ValueError(f"--adapter: expected KEY=VALUE,..., such as r=8,targets=attention; got {part!r}")
    return [f"adapter.{part.strip()}" for part in given]


def rounding(recipe: Recipe, how: Loading, *, planned: bool) -> Loading:
    """Return how the model of a recipe is loaded, with the recipe's bits unless it is planned alone.

    Raises ValueError, before any weight is read, without the library that rounds, for a model whose weights are
    quantised already and that no adapter trains on, and for one that an adapter is to be merged into.
    """
    own, source = recipe.adapter, recipe.data.model
    assert source is not None
    if method := stored_as(source):
        if own is None and not is_adapter(source):
            raise ValueError(
                f"the weights of {source} are quantised ({method}) and cannot be moved: give --adapter r=8, which "
                "trains beside them, or a model whose weights are whole"
            )
        if own is not None and own.merge:
            raise ValueError(
                f"--merge adds an adapter to whole weights, and those of {source} are quantised ({method}): leave it "
                "out, and merge the adapter into the model that is not"
            )
    bits = bits_of(own)
    return how if bits is None or planned else dataclasses.replace(how, bits=bits)


def chosen(options: argparse.Namespace, recipe: Recipe, mesh: Mesh | None) -> Recipe:
    """Return the recipe with `--merge`, checked before anything is loaded.

    Raises ValueError for `--merge` without an adapter, and for an adapter without its library, with weights that ranks
    share out, or with `--delta`, which has no use for one that is not merged.
    """
    if recipe.adapter is None:
        if options.merge:
            raise ValueError("--merge adds an adapter to the weights, and there is none: give --adapter r=8 too")
        return recipe
    check_peft("the recipe's adapter")
    if mesh is not None:
        raise ValueError("the recipe's adapter trains on whole weights: leave --mesh out, or adapter=null")
    if options.merge:
        recipe = dataclasses.replace(recipe, adapter=dataclasses.replace(recipe.adapter, merge=True))
    if options.delta and recipe.adapter is not None and not recipe.adapter.merge:
        raise ValueError("--delta says what changed in the model's weights, which an adapter leaves: give --merge too")
    return recipe
