"""`moe-unlearn delta`, `apply` and `revert`: what changed in a model as a file, applied to it and taken back."""

import argparse
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from moe_unlearn import delta
from moe_unlearn.cli.arguments import writable
from moe_unlearn.config import Recipe
from moe_unlearn.delta.folder import check_same
from moe_unlearn.files import check_output
from moe_unlearn.model.saving import saved_kinds

FILE = "delta.safetensors"  # the name in the folder of a run

Verb = Callable[[argparse.Namespace], None]


def write(options: argparse.Namespace) -> None:
    """Write what changed from one model's folder to another's as a delta: whoever has BASE and it has both models."""
    writable(options.out)
    recipe = None if options.recipe is None else _sha256(Path(options.recipe).read_bytes())
    _print_written(delta.write(options.base, options.changed, options.out, recipe=recipe))


def apply(options: argparse.Namespace) -> None:
    """Apply a delta to the model that it was made from; any other model is refused."""
    writable(options.out, folder=True)
    _print_applied(options, delta.apply(options.base, options.delta, options.out))


def revert(options: argparse.Namespace) -> None:
    """Take a delta back from the model that it led to; any other model is refused."""
    writable(options.out, folder=True)
    _print_applied(options, delta.revert(options.changed, options.delta, options.out))


def add_arguments(command: Callable[[str, Verb], argparse.ArgumentParser]) -> None:
    """Add the three verbs."""
    sub = command("delta", write)
    sub.add_argument("base", metavar="BASE", help="the folder of the model as it was")
    sub.add_argument("changed", metavar="MODEL", help="the folder of the changed model, of the same tensors")
    sub.add_argument("--recipe", help="a recipe whose SHA-256 the delta carries, such as RUN/recipe.yaml")
    sub.add_argument("--out", required=True, help="the safetensors file to write")
    sub = command("apply", apply)
    sub.add_argument("base", metavar="BASE", help="the folder of the model that the delta was made from")
    sub.add_argument("delta", metavar="DELTA", help="the file that `delta` or `run --delta` wrote")
    sub.add_argument("--out", required=True, help="the folder to write; a model that is there is replaced")
    sub = command("revert", revert)
    sub.add_argument("changed", metavar="MODEL", help="the folder of the model that the delta led to")
    sub.add_argument("delta", metavar="DELTA", help="the file that `delta` or `run --delta` wrote")
    sub.add_argument("--out", required=True, help="the folder to write; a model that is there is replaced")


def check_run(model: PreTrainedModel, base: str, out: Path) -> None:
    """Raise ValueError, before the work, if a run from the folder `base` to `out` could not write its delta."""
    folder = delta.ModelFolder(base)
    for made in (out / "model", out / FILE):
        check_output(made, folder.inputs)
    check_same(folder.kinds, saved_kinds(model), "what the run saves", folder.path)


def write_of_run(recipe: Recipe, out: Path) -> None:
    """Write the delta of a finished run into its folder."""
    assert recipe.data.model is not None
    made = delta.write(recipe.data.model, out / "model", out / FILE, recipe=_sha256(recipe.to_yaml().encode()))
    _print_written(made)


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
