"""`moe-unlearn delta`, `apply` and `revert`: what changed in a model as a file, applied to it and taken back."""

import argparse
import hashlib
import sys
from pathlib import Path

from transformers import PreTrainedModel

from moe_unlearn import delta
from moe_unlearn.cli.arguments import writable
from moe_unlearn.cli.options import DELTA
from moe_unlearn.config import Recipe
from moe_unlearn.delta.folder import check_same
from moe_unlearn.files import check_output
from moe_unlearn.model import loading
from moe_unlearn.model.saving import saved_kinds


def write(options: argparse.Namespace) -> None:
    """Write what changed from one model's folder to another's as a delta: whoever has BASE and it has both models."""
    writable(options.out)
    recipe = None if options.recipe is None else _sha256(Path(options.recipe).read_bytes())
    base, changed = map(loading.folder_of, (options.base, options.changed))
    for folder in (base, changed):
        if (Path(folder) / "config.json").exists():  # else what is missing is said below
            loading.check_whole(folder, "a delta")
    _print_written(delta.write(base, changed, options.out, recipe=recipe))


def apply(options: argparse.Namespace) -> None:
    """Apply a delta to the model that it was made from; any other model is refused."""
    writable(options.out, folder=True)
    _print_applied(options, delta.apply(loading.folder_of(options.base), options.delta, options.out))


def revert(options: argparse.Namespace) -> None:
    """Take a delta back from the model that it led to; any other model is refused."""
    writable(options.out, folder=True)
    _print_applied(options, delta.revert(loading.folder_of(options.changed), options.delta, options.out))


def base_of_run(recipe: Recipe, how: loading.Loading, out: Path) -> Path:
    """Return the folder of the model that a run to `out` begins with; its weights are not loaded.

    Raises ValueError for a run that could not write its delta.
    """
    if recipe.data.model is None:
        raise ValueError("--delta writes what changed since --model, which is missing: give --model")
    base = loading.folder_of(recipe.data.model)
    check_saved(loading.weightless(base, how), base)
    inputs = delta.ModelFolder(base).inputs
    for made in (out / "model", out / DELTA):
        check_output(made, inputs)
    return base


def check_saved(model: PreTrainedModel, base: Path) -> None:
    """Raise ValueError if what a run saves of a model has other tensors than its folder.

    A loaded one may: weights are tied if they are equal, which is not known without storage.
    """
    check_same(delta.ModelFolder(base).kinds, saved_kinds(model), "what the run saves", base)


def write_of_run(recipe: Recipe, base: Path, out: Path) -> None:
    """Write the delta of a finished run into its folder."""
    _print_written(delta.write(base, out / "model", out / DELTA, recipe=_sha256(recipe.to_yaml().encode())))


def _print_written(made: delta.Delta) -> None:
    stored, whole = made.size, made.model_size
    print(f"delta: {made.path}: {len(made.changed)} of {len(made.changes)} tensors changed")
    print(f"{stored:,} bytes, {stored / max(whole, 1):.1%} of the model's {whole:,}")
    print(f"base   {made.base}\nresult {made.result}")


def _print_applied(options: argparse.Namespace, made: delta.Applied) -> None:
    if made.left_out:
        print(f"left out, weights in another form: {', '.join(made.left_out)}", file=sys.stderr)
    print(f"model: {options.out}, with the digest {made.digest}")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
