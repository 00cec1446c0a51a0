"""What `moe-unlearn run` makes of its options for adapters, which the recipe's section `adapter` describes."""

import argparse
import dataclasses

from moe_unlearn.config import Recipe
from moe_unlearn.model.adapters import check_peft
from moe_unlearn.plan import Mesh


def overrides(options: argparse.Namespace) -> list[str]:
    """Return `--adapter` as overrides of the recipe; ValueError for what is no list of KEY=VALUE."""
    given = [] if options.adapter is None else options.adapter.split(",")
    for part in given:
        if not all(part.partition("=")):
            raise ValueError(f"--adapter: expected KEY=VALUE,..., such as r=8,targets=attention; got {part!r}")
    return [f"adapter.{part.strip()}" for part in given]


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
