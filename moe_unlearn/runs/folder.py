"""The folder of a run: of what it is, whether it is finished, and what of it a run has made.

`run.json` says what the run is of, sealed with its digest (`files.write_sealed`):

    model       `prepare.reference.model_digest`: all that the forward pass of the model as it was given reads
    forget      the SHA-256 of the forget examples: tokens, labels, alternates; so of documents, tokenizer and settings
    retain      that of the retain examples
    unseen      that of the unseen examples, where the recipe's objective steers by some
    retain_eval that of the retain examples that training does not see
    trainer     what the recipe's `trainer` section says of the training; what of logs and trackers may differ
    recipe      the recipe, of which `step.checks` says what may differ
    code        `code.code`: the version of this package and a digest of its sources
    commit      in a clone, the commit, by which the code is found again; None elsewhere
    ranks       how many processes share the rows of a step

A resume must agree in all of it but the commit. `manifest` has the digests of the model and of the figures of a
finished run.
"""

import contextlib
import hashlib
import itertools
import json
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_unlearn.checkpoint import CheckpointError, manifest
from moe_unlearn.config import Recipe
from moe_unlearn.data import Example
from moe_unlearn.files import read_sealed, remove, write_sealed
from moe_unlearn.prepare.reference import model_digest
from moe_unlearn.ranks import gathered, is_first
from moe_unlearn.runs import names as given
from moe_unlearn.runs.code import code, commit
from moe_unlearn.runs.names import FACTS, MADE, MANIFEST, RESULTS
from moe_unlearn.step import UnlearnStep
from moe_unlearn.step.checks import check_recipe
from moe_unlearn.trainer.arguments import checked

CHECKPOINTS, MODEL = given.CHECKPOINTS, given.MODEL
_SIDES = ("forget", "retain", "unseen", "retain_eval")
_TOLD = ("report_to", "run_name", "project", "log", "disable_tqdm", "hub", "push_to_hub")  # how such keys begin
_DIGESTS = ("model", *_SIDES, "commit")
_COMPARED = ("model", *_SIDES, "trainer", "code", "ranks")  # as they are; a recipe key by key


def check_unused(folder: Path) -> None:
    """Raise ValueError, which says what to do, if a folder has what a run makes."""
    if used := [name for name in MADE if _is_used(folder / name)]:
        raise ValueError(
            f"expected an --out that no run has used; {folder} has {', '.join(used[:3])}: --resume goes on with that "
            "run, --overwrite removes what it has made and begins anew"
        )


@contextlib.contextmanager
def dated(root: Path, name: str) -> Iterator[Path]:
    """Make the folder `root`/DATE-`name`-N for a run; N is the first that is free. One that stays empty is removed.

    Of two runs that begin at one time each gets a folder of its own, which its owner alone may enter; all ranks get
    that of the first one. What the name of a folder should not hold becomes a dash.
    """
    new = not root.exists()
    taken = Path(gathered(lambda: _claimed(root, name) if is_first() else "", lambda path: path)[1][0])
    try:
        yield taken
    finally:
        for folder in (taken, *([root] if new else [])) if is_first() else ():
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()


def _claimed(root: Path, name: str) -> str:
    """Make the folder of `dated`, and return its path."""
    root.mkdir(parents=True, exist_ok=True)
    day = time.strftime("%Y-%m-%d")
    plain = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"
    for number in itertools.count(1):
        path = root / f"{day}-{plain}-{number}"
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)  # fails if another has just made it
            break
    return str(path)


def clear(folder: Path) -> None:
    """Remove what a run has made in a folder, and nothing else."""
    for name in MADE:
        remove(folder / name)


def facts_of(step: UnlearnStep, sets: Mapping[str, Sequence[Example]], ranks: int) -> dict[str, Any]:
    """Return what a run on `sets` by side is of, as above, before its first step; every rank calls this."""
    return {
        "model": model_digest(step.model, ranks=step.ranks),
        **{side: _digest(sets[side]) for side in _SIDES if side in sets},
        "trainer": {key: value for key, value in checked(step.recipe.trainer).items() if not key.startswith(_TOLD)},
        "recipe": step.recipe.to_dict(),
        "code": code(),
        "commit": commit(),
        "ranks": ranks,
    }


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write what a run is of into its folder."""
    write_sealed(folder / FACTS, json.dumps(facts, indent=1).encode())


def check_same(folder: Path, facts: dict[str, Any], recipe: Recipe) -> None:
    """Raise ValueError, which names all that differs, unless the run in a folder is of these `facts`.

    A folder without a checkpoint and without facts is of no run yet.
    """
    path = folder / FACTS
    if not path.exists() and not _is_used(folder / CHECKPOINTS):
        return
    remedy = "resume with what the run began with, or begin anew with --overwrite or in another --out"
    try:
        former = json.loads(read_sealed(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read of what the run is, {path}: {error}; {remedy}") from error
    try:
        check_recipe(recipe, former["recipe"])
    except ValueError as error:
        raise ValueError(f"{folder} cannot be resumed: {error}; {remedy}") from error
    different = [name for name in _COMPARED if former.get(name) != facts.get(name)]
    if different:
        if "code" in different and former.get("commit") != facts["commit"]:
            different.append("commit")
        told = [f"{name} (was {_told(name, former)}, is {_told(name, facts)})" for name in different]
        raise ValueError(f"{folder} has a run of something else: {', '.join(told)}; {remedy}")


def seal(folder: Path, steps: int) -> None:
    """Note that a run is finished, of `steps` steps, with the digests of what it has written."""
    names = [f"{path.relative_to(folder)}" for path in (folder / MODEL).rglob("*") if path.is_file()]
    names += [name for name in RESULTS if (folder / name).is_file()]
    manifest.seal(folder, {"steps": steps}, names)


def finished(folder: Path, steps: int, wanted: Iterable[str]) -> bool:
    """Return whether a folder has a finished run of at least `steps` steps with the `wanted` files, as written."""
    if not (folder / MANIFEST).exists():
        return False
    try:
        known = manifest.verify(folder)
    except CheckpointError as error:
        warnings.warn(f"what the run has written is damaged, and is written again: {error}", stacklevel=2)
        return False
    return bool(known.get("steps", -1) >= steps and known["files"].keys() >= set(wanted))


def _is_used(path: Path) -> bool:
    """Return whether a file is there, or a folder with something in it: the Trainer makes its own when it is made."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _digest(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(example).encode())
    return digest.hexdigest()


def _told(name: str, facts: dict[str, Any]) -> str:
    value = str(facts.get(name))
    return value[:12] if name in _DIGESTS else value
