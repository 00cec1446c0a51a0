"""Commit, verify, resume: what was interrupted or corrupted is never mistaken for a checkpoint."""

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import time

import pytest
import torch

from moe_unlearn import checkpoint
from moe_unlearn.checkpoint import CheckpointError
from moe_unlearn.files import UNFINISHED

STATE = {
    "weights": {"a.weight": torch.arange(6.0).view(2, 3).t(), "b": torch.ones(3, dtype=torch.bfloat16)},
    "nested": {0: {"step": 5, "moment": torch.zeros(0)}, "1": [1.5, None, True, (1, "x")]},
    "text": "größe",
    "nan": float("nan"),
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


@pytest.mark.quick
def test_round_trip_keeps_types_and_bits(tmp_path):
    folder = checkpoint.commit(tmp_path, 7, {"run": STATE})
    step, states = checkpoint.load(folder)
    assert folder.name == "step-00000007" and step == 7
    assert same(STATE, states["run"])


@pytest.mark.quick
def test_unknown_types_are_refused_and_leave_nothing(tmp_path):
    with pytest.raises(TypeError, match="got set"):
        checkpoint.commit(tmp_path, 1, {"run": {"bad": {1, 2}}})
    assert checkpoint.latest(tmp_path) is None


@pytest.mark.quick
def test_old_checkpoints_go_last(tmp_path):
    for step in (1, 2, 3):
        checkpoint.commit(tmp_path, step, {"run": {"step": step}}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    checkpoint.commit(tmp_path, 3, {"run": {"step": "again"}}, keep=2)
    assert checkpoint.load(checkpoint.latest(tmp_path))[1] == {"run": {"step": "again"}}


@pytest.mark.quick
def test_a_broken_newest_falls_back_and_stays(tmp_path):
    checkpoint.commit(tmp_path, 1, {"run": STATE})
    newest = checkpoint.commit(tmp_path, 2, {"run": STATE})
    (newest / "run.safetensors").write_bytes(b"short")
    with pytest.warns(UserWarning, match="skipping a broken checkpoint: .*run.safetensors.*bytes"):
        assert checkpoint.latest(tmp_path).name == "step-00000001"
    assert newest.exists()


def test_every_corruption_is_found(tmp_path):
    """Bit flips, truncations and zeroed runs in any file, 400 seeded ones."""
    good = checkpoint.commit(tmp_path / "good", 1, {"run": STATE})
    files = sorted(p.name for p in good.iterdir())
    generator = random.Random(0)
    for trial in range(400):
        bad = tmp_path / f"bad{trial}"
        shutil.copytree(good, bad)
        path = bad / generator.choice(files)
        data = bytearray(path.read_bytes())
        position = generator.randrange(len(data))
        kind = generator.choice(["flip", "cut", "zero"])
        if kind == "flip":
            data[position] ^= 1 << generator.randrange(8)
        elif kind == "cut":
            del data[position:]
        else:
            data[position : position + 64] = bytes(len(data[position : position + 64]))
        if bytes(data) == path.read_bytes():
            continue
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            checkpoint.load(bad)
        shutil.rmtree(bad)


def rewrite_manifest(folder, change):
    """A manifest that matches its own digest, as an attacker would write it."""
    body = change((folder / "manifest").read_bytes().partition(b"\n")[2])
    (folder / "manifest").write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname", "link.json", "absent.json"])
def test_hostile_manifests(tmp_path, name):
    folder = checkpoint.commit(tmp_path, 1, {"run": {"x": 1}})
    (tmp_path / "outside.json").write_text("{}", encoding="utf-8")
    (folder / "link.json").symlink_to(tmp_path / "outside.json")

    def add_file(body):
        manifest = json.loads(body)
        manifest["files"][name] = {"size": 2, "sha256": "0"}
        return json.dumps(manifest).encode()

    rewrite_manifest(folder, add_file)
    with pytest.raises(CheckpointError, match="missing or not a plain file"):
        checkpoint.verify(folder)


@pytest.mark.quick
@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"format": 1}',
        "null",
        '{"files": {}, "format": "other"}',
        '{"format": "moe-unlearn checkpoint 1", "files": []}',
        '{"format": "moe-unlearn checkpoint 1", "files": {"run.json": {}}}',
    ],
)
def test_unreadable_manifests(tmp_path, text):
    folder = checkpoint.commit(tmp_path, 1, {"run": {"x": 1}})
    rewrite_manifest(folder, lambda body: text.encode())
    with pytest.raises(CheckpointError):
        checkpoint.load(folder)


def write_until_killed(root):
    """Fork a child that commits one checkpoint after the other; return it and the pipe that says which are there."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the threads of an OpenMP pool do not survive a fork
            for step in itertools.count(1):
                checkpoint.commit(root, step, {"run": {"step": step, "t": torch.full((1 << 16,), float(step))}})
                os.write(write, b"%d\n" % step)
        finally:
            os._exit(1)
    os.close(write)
    return child, os.fdopen(read, encoding="ascii")


@pytest.mark.slow
def test_a_killed_writer_loses_no_acknowledged_checkpoint(tmp_path):
    generator = random.Random(0)
    for trial in range(6):
        root = tmp_path / str(trial)
        writer, said = write_until_killed(root)
        with said:
            first = said.readline()
            time.sleep(generator.uniform(0, 0.3))
            os.kill(writer, signal.SIGKILL)
            assert os.WTERMSIG(os.waitpid(writer, 0)[1]) == signal.SIGKILL
            acknowledged = max(map(int, [first, *said]))
        step, states = checkpoint.load(checkpoint.latest(root))
        assert step >= acknowledged
        assert states["run"]["step"] == step and (states["run"]["t"] == step).all()
        checkpoint.commit(root, step + 1, {"run": {}})
        assert not list(root.glob(f"{UNFINISHED}*"))


@pytest.mark.quick
def test_random_state_round_trip():
    state = checkpoint.random_state()
    first = torch.rand(3)
    checkpoint.set_random_state(state)
    assert torch.equal(torch.rand(3), first)
