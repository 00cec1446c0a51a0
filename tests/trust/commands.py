"""Every verb that writes, on a tiny model, with one fault of the disk or one damaged file at a time."""

import itertools
import json
import random
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import PIL.Image
import rouge_score.rouge_scorer  # noqa: F401
import safetensors.torch

from moe_unlearn.checkpoint import verify
from moe_unlearn.cli.launch import REFUSED
from moe_unlearn.files import UNFINISHED
from moe_unlearn.ops.native import expert_mlp, expert_wgrad, token_loss  # noqa: F401
from moe_unlearn.regress.report import CORRUPT
from tests.support.command_line import saved
from tests.support.damage import damaged
from tests.support.foreign_softmax import example
from tests.trust.faults import CRASHES, KILLED, Fault, attempt

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
}
RESUME = (*VERBS["run"], "--resume")
MASKED = ("run", "wagle", "--model", "model", *SIDES, "--out", "masked", *TINY, "wagle.mask=mask.safetensors")


PIL.Image.preinit()


class Kind(NamedTuple):
    """A kind of file: the command that reads it, what makes it, and which files hold what is compared.

    The maker is killed so many of its calls before its end; None lets it end.
    """

    files: str
    reader: tuple[str, ...]
    results: tuple[str, ...] = ()
    maker: str | None = None
    killed: int | None = None


KINDS = {
    "examples": Kind("cache/examples-*", VERBS["stats"], ("stats.json",), "stats"),
    "groups of a mask": Kind("mask.safetensors.groups/**/*", VERBS["mask"], ("mask.safetensors",), "mask", 20),
    "mask": Kind("mask.safetensors", MASKED, ("masked/model/model.safetensors",), "mask"),
    "checkpoint": Kind("out/checkpoints/[!.]*/*", RESUME, ("out/model/model.safetensors",), "run", 400),
    "delta": Kind("delta.safetensors", VERBS["apply"], ("applied/model.safetensors", "applied/config.json")),
    "records of kernels": Kind("kernel_store/*/*", ("kernels", "check", "--module", "softmax.py"), (), "kernels"),
}
_WORKING = {"tmp", "lock", "mask.safetensors.groups"}  # what is there until a command has ended well
_TIMED = {".json", ".md", ".html", ".svg", ".png"}  # what such files say of times differs from run to run


class Commands:
    """Runs verbs in copies of a folder, each copy below `root` and gone when it has been looked at."""

    def __init__(self, root: Path):
        self.root, self.given = root, root / "given"
        self._numbers = itertools.count()
        self._whole: dict[str, tuple[int, dict[str, bytes]]] = {}
        self._prepared: dict[str, tuple[Path, list[str], dict[str, bytes]]] = {}
        self.given.mkdir()
        saved(self.given)
        for file in self.given.glob("*.jsonl"):  # the texts of two steps, since every trial trains on them
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            file.write_text("".join(lines[:4]), encoding="utf-8")
        shutil.copytree(self.given / "model", self.given / "changed")
        file = self.given / "changed" / "model.safetensors"
        weights = safetensors.torch.load_file(file)
        next(iter(weights.values())).view(-1)[0].add_(1)
        safetensors.torch.save_file(weights, file, {"format": "pt"})
        asked = [{"question": "who is agent 7?", "answer": "a tall man"}, {"question": "where?", "answer": "here"}]
        lines = "".join(json.dumps(line) + "\n" for line in asked)
        (self.given / "asked.jsonl").write_text(lines, encoding="utf-8")
        (self.given / "softmax.py").write_text(example(), encoding="utf-8")
        made = ("run", "combined", "--model", "model", *SIDES, "--out", "done", *TINY)
        for command in (("delta", "model", "changed", "--out", "delta.safetensors"), made):
            ended = attempt(command, self.given)
            assert ended.code == 0, ended.said

    def whole(self, verb: str) -> tuple[int, dict[str, bytes]]:
        """Return how many calls of a verb change files, and the content of its folder afterwards."""
        if verb not in self._whole:
            folder = self._copy(self.given)
            ended = attempt(VERBS[verb], folder)
            assert ended.code == 0, ended.said
            self._whole[verb] = ended.calls, contents(folder)
        return self._whole[verb]

    def meets(self, verb: str, fault: Fault) -> str:
        """Return how a verb ends that meets a fault: "killed", "refused", or with results that are "whole".

        Raises AssertionError unless it loses nothing, leaves nothing half, and can go on.
        """
        _, whole = self.whole(verb)
        before, folder = contents(self.given), self._copy(self.given)
        ended = attempt(VERBS[verb], folder, fault)
        told = f"{verb}, {fault.kind} at {fault.at}: exit code {ended.code}\n{ended.said}"
        if fault.kind in CRASHES:
            assert ended.code == KILLED, told
        else:
            assert ended.refused() or ended.code == 0, told
            assert not [*folder.rglob(f"{UNFINISHED}*")] or ended.code == 0, told
        left = contents(folder)
        assert before.keys() <= left.keys(), told
        for name, content in left.items():
            expected = [each[name] for each in (before, whole) if name in each]
            assert any(_alike(name, content, one) for one in expected), f"{told}\n{name}"
            if Path(name).name == "manifest":
                verify((folder / name).parent)
        if ended.code == 0:
            assert left.keys() == whole.keys(), told
        again = attempt(RESUME if verb == "run" else VERBS[verb], folder)
        assert again.code == 0, f"{told}\nand then {again.code}\n{again.said}"
        assert not (folder / "mask.safetensors.groups").exists(), told
        made = contents(folder)
        assert made.keys() == whole.keys(), told
        for name, content in made.items():
            assert _alike(name, content, whole[name]), f"{told}\n{name}"
        shutil.rmtree(folder)
        return {KILLED: "killed", 0: "whole"}.get(ended.code, "refused")

    def files(self, kind: str) -> list[str]:
        """Return the names of the files of a kind."""
        return self._of(kind)[1]

    def reads(self, kind: str, file: str, form: str, seed: str) -> str:
        """Return what becomes of a command that reads a damaged file.

        "refused": an exit code and a line say so. "harmless": it writes the same results. "same": the damage changed
        no byte. Raises AssertionError where it ends well with other results, silently, or in any other way.
        """
        made, _, results = self._of(kind)
        content = (made / file).read_bytes()
        left = damaged(content, form, random.Random(seed))
        if left == content:
            return "same"
        folder = self._copy(made)
        (folder / file).unlink() if left is None else (folder / file).write_bytes(left)
        ended = attempt(KINDS[kind].reader, folder)
        told = f"{kind}, {form} {file} ({seed}): exit code {ended.code}\n{ended.said}"
        if ended.code == 0:
            alike = [(folder / name).read_bytes() == content for name, content in results.items()]
            assert all(alike), f"silent: {told}"
        else:  # `kernels` prints a table instead of a line
            assert ended.code in (REFUSED, CORRUPT) and "Traceback" not in ended.said, told
        shutil.rmtree(folder)
        return "refused" if ended.code else "harmless"

    def _of(self, name: str) -> tuple[Path, list[str], dict[str, bytes]]:
        if name not in self._prepared:
            kind, folder = KINDS[name], self._copy(self.given)
            if kind.maker is not None:
                calls, _ = self.whole(kind.maker)
                attempt(VERBS[kind.maker], folder, kind.killed and Fault("killed", calls - kind.killed))
            for result in set(kind.results) - {kind.files}:
                (folder / result).unlink(missing_ok=True)
            files = sorted(str(path.relative_to(folder)) for path in folder.glob(kind.files) if path.is_file())
            assert files, f"no {name}: {sorted(contents(folder))}"
            whole = self._copy(folder)
            ended = attempt(kind.reader, whole)
            assert ended.code == 0, ended.said
            self._prepared[name] = folder, files, {result: (whole / result).read_bytes() for result in kind.results}
        return self._prepared[name]

    def _copy(self, folder: Path) -> Path:
        copy = self.root / str(next(self._numbers))
        shutil.copytree(folder, copy)
        return copy


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of the files that have their own names; a record's name has the digest of its time too."""
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    own = [path for path in files if not any(p.startswith(UNFINISHED) or p in _WORKING for p in path.parts)]
    return {re.sub("[0-9a-f]{64}", "DIGEST", str(path)): (folder / path).read_bytes() for path in own}


def _alike(name: str, found: bytes, expected: bytes) -> bool:
    """Return whether two files are the same, or whole files that may tell of other times; a manifest covers others."""
    if found == expected or "checkpoints" in Path(name).parts or Path(name).name == "manifest":
        return True
    kind = Path(name).suffix
    if kind == ".safetensors":  # the entries of a header's metadata come in any order
        values, others = safetensors.torch.load(found), safetensors.torch.load(expected)
        return values.keys() == others.keys() and all(values[key].equal(others[key]) for key in values)
    if kind == ".json":
        return isinstance(json.loads(found), type(json.loads(expected)))
    return kind in _TIMED and found[-8:] == expected[-8:]
