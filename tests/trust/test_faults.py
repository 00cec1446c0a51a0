"""Every verb that writes, with a disk that fails or a process that dies at the n-th write: nothing is lost or half.

A command ends as bad input does, or what it wrote is whole; a file under its own name is what was there before or what
an undisturbed command writes; and the command given once more, when the disk is well, ends as if nothing had been.
`make test` draws a few n for each verb; nightly tries all.
"""

import json
import random
import re
import shutil
from pathlib import Path

import matplotlib.pyplot  # noqa: F401  # verbs import it and the next late; here every fork has them
import pytest
import rouge_score.rouge_scorer  # noqa: F401
import safetensors.torch

from moe_unlearn.checkpoint import verify
from moe_unlearn.files import UNFINISHED
from tests.support.command_line import saved
from tests.support.foreign_softmax import example
from tests.trust.faults import KILLED, KINDS, Fault, attempt

SIDES = ("--forget", "forget.jsonl", "--retain", "retain.jsonl")
ASKED = ("--forget", "asked.jsonl", "--new-tokens", "4", "--instruction", "or")
TINY = ("--set", "steps=2", "batch_size=2", "data.max_length=24")
VERBS = {
    "stats": ("stats", "--model", "model", *SIDES, "--out", "stats.json", "--cache", "cache"),
    "mask": ("mask", "--model", "model", *SIDES, "--memory", "64KiB", "--out", "mask.safetensors"),
    "alternates": ("alternates", "--model", "model", *ASKED, "--out", "alternates.jsonl"),
    "eval": ("eval", "--model", "model", *SIDES, "--out", "eval.json"),
    "delta": ("delta", "model", "changed", "--out", "made.safetensors"),
    "apply": ("apply", "model", "delta.safetensors", "--out", "applied"),
    "revert": ("revert", "changed", "delta.safetensors", "--out", "reverted"),
    "report": ("report", "done"),
    "kernels": ("kernels", "record", "--module", "softmax.py"),
    "run": ("run", "combined", "--model", "model", *SIDES, "--out", "out", *TINY),
}  # fmt: skip
WORKING = {"tmp", "lock", "mask.safetensors.groups"}  # what is there until a command has ended well
TIMED = {".json", ".md", ".svg", ".png"}  # what such files say of times differs from run to run


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with what every verb reads."""
    folder = tmp_path_factory.mktemp("given")
    saved(folder)
    shutil.copytree(folder / "model", folder / "changed")
    weights = safetensors.torch.load_file(folder / "changed" / "model.safetensors")
    next(iter(weights.values())).view(-1)[0].add_(1)
    safetensors.torch.save_file(weights, folder / "changed" / "model.safetensors", {"format": "pt"})
    asked = [{"question": "who is agent 7?", "answer": "a tall man"}, {"question": "where?", "answer": "here"}]
    (folder / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked), encoding="utf-8")
    (folder / "softmax.py").write_text(example(), encoding="utf-8")
    assert attempt(("delta", "model", "changed", "--out", "delta.safetensors"), folder).code == 0
    assert attempt(("run", "combined", "--model", "model", *SIDES, "--out", "done", *TINY), folder).code == 0
    return folder


@pytest.fixture(scope="module")
def undisturbed(given, tmp_path_factory):
    """Return, for a verb, how many of its calls change files, and what an undisturbed command leaves."""
    found = {}

    def of(verb):
        if verb not in found:
            folder = tmp_path_factory.mktemp(verb) / "whole"
            shutil.copytree(given, folder)
            ended = attempt(VERBS[verb], folder)
            assert ended.code == 0, ended.said
            found[verb] = ended.calls, contents(folder)
        return found[verb]

    return of


def contents(folder):
    """Return the bytes of the files that have their own names; a record's name has the digest of its time too."""
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    own = [path for path in files if not any(p.startswith(UNFINISHED) or p in WORKING for p in path.parts)]
    return {re.sub("[0-9a-f]{64}", "DIGEST", str(path)): (folder / path).read_bytes() for path in own}


def alike(name, found, expected):
    """Return whether two files are the same, or whole files that may tell of other times; a manifest covers others."""
    if found == expected or "checkpoints" in Path(name).parts or Path(name).name == "manifest":
        return True
    kind = Path(name).suffix
    if kind == ".json":
        return isinstance(json.loads(found), type(json.loads(expected)))
    return kind in TIMED and found[-8:] == expected[-8:]


def tried(verb, kind, at, given, undisturbed, folder):
    """Let a verb meet one fault, check what it leaves, and then what the same command makes of that."""
    _, whole = undisturbed(verb)
    before = contents(given)
    shutil.copytree(given, folder)
    ended = attempt(VERBS[verb], folder, Fault(kind, at))
    told = f"{kind} at {at}: exit code {ended.code}\n{ended.said}"
    if KINDS[kind] is None:
        assert ended.code == KILLED, told
    else:
        assert ended.refused() or ended.code == 0, told
        assert not [*folder.rglob(f"{UNFINISHED}*")] or ended.code == 0, told
    left = contents(folder)
    assert before.keys() <= left.keys(), told
    for name, content in left.items():
        expected = [each[name] for each in (before, whole) if name in each]
        assert any(alike(name, content, one) for one in expected), f"{told}\n{name}"
    for name in left:
        if Path(name).name == "manifest":
            verify((folder / name).parent)
    if ended.code == 0:
        assert left.keys() == whole.keys(), told
    again = attempt((*VERBS[verb], *(["--resume"] if verb == "run" and (folder / "out").exists() else [])), folder)
    assert again.code == 0, f"{told}\nand then {again.code}\n{again.said}"
    assert not (folder / "mask.safetensors.groups").exists(), told
    made = contents(folder)
    assert made.keys() == whole.keys(), told
    for name, content in made.items():
        assert alike(name, content, whole[name]), f"{told}\n{name}"
    shutil.rmtree(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", VERBS)
def test_a_sample_of_faults(verb, kind, given, undisturbed, tmp_path):
    calls, _ = undisturbed(verb)
    for at in random.Random(f"{verb} {kind}").sample(range(calls), 1 if verb == "run" else 3):
        tried(verb, kind, at, given, undisturbed, tmp_path / str(at))


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", VERBS)
def test_every_fault(verb, kind, given, undisturbed, tmp_path):
    calls, _ = undisturbed(verb)
    for at in range(calls):
        tried(verb, kind, at, given, undisturbed, tmp_path / str(at))
