"""A rank that is killed while it saves, at any point, leaves the checkpoint that was there."""

import os
import signal
from pathlib import Path

import pytest
import torch

from moe_unlearn.checkpoint import latest, sharded, storage, tensor_file
from moe_unlearn.checkpoint.sharded import Slices
from moe_unlearn.files import UNFINISHED
from tests.support.forked_ranks import found_on, run_forked

NEW = "step-00000002"
# who dies, in which function, at its which call in a save, before or after it
BEFORE, AFTER = "before", "after"
POINTS = {
    "before its plan": (1, storage.SaveSlices, "create_local_plan", 1, BEFORE),
    "half-way through its file": (1, tensor_file, "bytes_of", 2, BEFORE),
    "with its file written": (1, storage, "describe", 1, AFTER),
    "having shared out the plans": (0, storage.SaveSlices, "create_global_plan", 1, AFTER),
    "with its own file half-written": (0, tensor_file, "bytes_of", 2, BEFORE),
    "before the manifest": (0, storage, "write_manifest", 1, BEFORE),
    "with the manifest written": (0, storage, "write_manifest", 1, AFTER),
    "before the folder has its name": (0, os, "replace", 1, BEFORE),
    "with the folder under its name": (0, os, "replace", 1, AFTER),
}


def tree(step: int, rank: int) -> dict:
    """Return what a rank has at a step: every number says so."""
    rows = torch.arange(3) + 3 * rank
    values = torch.full((3, 4), float(10 * step + rank))
    return {"m": Slices(rows, values, 6), "v": Slices(rows, values + 100, 6), "t": torch.full((5,), float(step))}


def check(folder: Path, step: int) -> None:
    found = sharded.load(folder)
    assert found["m"].values[:, 0].tolist() == [10.0 * step] * 3 + [10.0 * step + 1] * 3
    assert torch.equal(found["v"].values, found["m"].values + 100) and (found["t"] == step).all()


def die_at(owner: object, name: str, call: int, when: str) -> None:
    """Let this process kill itself at one call of a function."""
    inner, calls = getattr(owner, name), []

    def counted(*arguments, **keywords):
        if owner is os and not str(arguments[1]).endswith(NEW):
            return inner(*arguments, **keywords)  # a file gets its name
        calls.append(None)
        if len(calls) == call and when == BEFORE:
            os.kill(os.getpid(), signal.SIGKILL)
        result = inner(*arguments, **keywords)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, counted)


@pytest.mark.parametrize("point", POINTS)
def test_a_rank_killed_while_it_saves_leaves_the_former_checkpoint(tmp_path, point):
    victim, owner, name, call, when = POINTS[point]
    root = tmp_path / "root"

    def act(rank: int) -> None:
        sharded.commit(root, 1, tree(1, rank))
        if rank == victim:
            die_at(owner, name, call, when)
        sharded.commit(root, 2, tree(2, rank))

    ended = run_forked(2, tmp_path, act)
    assert ended[victim] == -signal.SIGKILL and ended[1 - victim] == 1
    error = (tmp_path / f"error{1 - victim}").read_text(encoding="utf-8")
    assert "sharded.commit" in error and "gloo" in error.lower()
    committed = 2 if name == "replace" and when == AFTER else 1
    assert latest(root).name == f"step-0000000{committed}"
    check(latest(root), committed)
    left = list(root.glob(f"{UNFINISHED}*"))
    assert bool(left) == (victim == 0 and committed == 1)  # the first rank clears up, unless it is the one
    sharded.commit(root, 3, {"of": "one process"})
    assert latest(root).name == "step-00000003" and not list(root.glob(f"{UNFINISHED}*"))


def test_two_ranks_commit_and_keep_the_newest(tmp_path):
    root = tmp_path / "root"

    def act(rank: int) -> None:
        assert sharded.latest(root) is None
        for step in (1, 2, 3):
            folder = sharded.commit(root, step, tree(step, rank), keep=2)
            assert folder.exists()  # on every rank, as soon as it returns
        assert sharded.latest(root) == root / "step-00000003"
        sharded.save(root / "step-00000003", tree(4, rank))

    found_on(2, tmp_path, act)
    assert sorted(path.name for path in root.iterdir()) == ["step-00000002", "step-00000003"]
    check(root / "step-00000002", 2)
    check(root / "step-00000003", 4)


@pytest.mark.parametrize("where", ["write", "commit"])
def test_a_disk_that_is_full_is_an_error_on_all_ranks_and_changes_nothing(tmp_path, where):
    root = tmp_path / "root"

    replace = os.replace

    def full(*arguments: object) -> None:
        if len(arguments) == 2 and arguments[1] != root:
            return replace(*arguments)  # a file gets its name
        raise OSError(28, "No space left on device")

    def act(rank: int) -> None:
        sharded.save(root, tree(1, rank))
        if where == "write" and rank == 1:
            tensor_file.bytes_of = full
        if where == "commit":
            os.replace = full
        sharded.save(root, tree(2, rank))

    assert run_forked(2, tmp_path, act) == [1, 1]
    guilty = 1 if where == "write" else 0
    for rank in range(2):
        error = (tmp_path / f"error{rank}").read_text(encoding="utf-8")
        assert f"CheckpointError: {root}: rank {guilty}: [Errno 28] No space left" in error
    check(root, 1)
    assert [path for path in tmp_path.iterdir() if path.name.startswith(UNFINISHED)] == []


def test_ranks_that_do_not_see_one_file_system_are_told(tmp_path):
    def act(rank: int) -> None:
        if rank == 1:
            Path.is_dir = lambda path: False
        sharded.save(tmp_path / "root", tree(1, rank))

    assert run_forked(2, tmp_path, act) == [1, 1]
    assert all("must see one file system" in (tmp_path / f"error{i}").read_text(encoding="utf-8") for i in range(2))
    assert not (tmp_path / "root").exists()
