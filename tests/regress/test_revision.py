"""A tree against a git revision of it: in a scratch repository, and of this project."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from moe_unlearn.regress import revision
from moe_unlearn.regress.revision import WorkerError, compare
from tests.support.threads import torch_threads

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")]

KERNELS = """
import torch
from helper import passes
from moe_unlearn.regress import timing
from moe_unlearn.regress.case import Case, register

# a softmax takes a millisecond on this clock, whatever the machine does beside it
clock = 0.0
timing.thread_time = lambda: clock

print("what a kernel's file prints is not an answer")

def inputs(seed, n=256):
    return {"x": torch.randn(n, n, generator=torch.Generator().manual_seed(seed))}

def softmax(x):
    global clock
    clock += 1e-3
    return torch.softmax(x, -1)

def slow(x):
    for _ in range(passes):
        y = softmax(x)
    return y

def wrong(x):
    return softmax(x) * factor

def case(name, function):
    register(Case(name, function, softmax, inputs, sizes={"n": 256}))

def nearly_exact(a, b):
    global clock
    clock += 1e-3
    return (a.double() @ b.double()).float() if exact else a @ b

def operands(seed, n):
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(n, n, generator=generator), "b": torch.randn(n, n, generator=generator)}

factor, exact = 1.0, True
register(Case("nearly exact", nearly_exact, lambda a, b: a @ b, operands, sizes={"n": 200}))
case("same", softmax)
case("slow", slow)
case("wrong", wrong)
"""


@pytest.fixture(autouse=True)
def one_thread():
    """Processor time, which neighbours hardly disturb; both workers take the number of threads from here."""
    with torch_threads(1):
        yield


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A commit with three kernels; in the working tree one is slower, one wrong, one new and one fails."""
    root = tmp_path / "repository"
    temporary = tmp_path / "temporary"
    for folder in (root, temporary):
        folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    # neither the machine's settings (signed commits, other hooks) nor the repository whose hook runs the tests
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    (root / "kernels.py").write_text(textwrap.dedent(KERNELS), encoding="utf-8")
    (root / "helper.py").write_text("passes = 2\n", encoding="utf-8")
    who = ["-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "base"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    hook = root / ".git" / "hooks" / "post-checkout"
    hook.parent.mkdir(exist_ok=True)  # comes with git's templates, which not every installation has
    hook.write_text("#!/bin/sh\ntouch hooked\n", encoding="utf-8")
    hook.chmod(0o755)
    (root / "helper.py").write_text("passes = 3\n", encoding="utf-8")
    source = (
        (root / "kernels.py")
        .read_text(encoding="utf-8")
        .replace("factor, exact = 1.0, True", "factor, exact = 1.01, False")
    )
    source += 'case("new", softmax)\ncase("broken", lambda x: 1 / 0)\n'
    (root / "kernels.py").write_text(source, encoding="utf-8")
    yield root
    assert list(temporary.iterdir()) == []
    assert len(_git(root, "worktree", "list").splitlines()) == 1


def _git(root, *arguments):
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout


def _files(root):
    return {
        path: path.read_bytes() for path in root.rglob("*") if path.is_file() and not path.is_relative_to(root / ".git")
    }


def test_head_against_base_in_a_scratch_repository(repository, monkeypatch):
    # every pair of processes imports torch and transformers twice
    monkeypatch.setattr(revision, "CONFIRMATIONS", 1)
    before, said = _files(repository), []
    found = {r.case: r for r in compare("HEAD", modules=[repository / "kernels.py"], say=said.append)}
    assert {name: result.status for name, result in found.items()} == {
        "same": "equal",
        "slow": "slower",
        "wrong": "inaccurate",
        "new": "new",
        "broken": "failed",
        # the base is nearly exact: what roundings the reference has is asked of the worker
        "nearly exact": "accurate",
    }
    assert found["slow"].speed.startswith("slower: 1.5")
    assert found["same"].speed.startswith("same: 1.000 x")
    assert found["wrong"].speed == "suppressed: the results are wrong, so their speed says nothing"
    assert "head: ZeroDivisionError" in found["broken"].message
    assert said[0].endswith("nothing to build")
    assert _files(repository) == before


@pytest.mark.nightly
def test_a_worker_that_cannot_start_and_a_build_that_fails_leave_nothing(repository):
    (repository / "helper.py").unlink()
    said = []
    with pytest.raises(WorkerError, match="head: ModuleNotFoundError: No module named 'helper'"):
        compare("HEAD", modules=[repository / "kernels.py"], say=said.append, build=["git", "no-such-command"])
    assert "not built, git failed" in said[0]


def test_a_worker_that_cannot_be_started_is_named(repository, monkeypatch):
    monkeypatch.setattr(revision.sys, "executable", str(repository / "no-python"))
    with pytest.raises(WorkerError, match="head cannot be started: .*no-python"):
        compare("HEAD", modules=[repository / "kernels.py"])


@pytest.mark.nightly
def test_a_worker_that_dies_fails_its_own_case(repository):
    source = (repository / "kernels.py").read_text(encoding="utf-8")
    dies = 'case("a case before the others", lambda x: __import__("os")._exit(3))\n'
    (repository / "kernels.py").write_text(source.replace('case("same"', dies + 'case("same"'), encoding="utf-8")
    found = {r.case: r for r in compare("HEAD", modules=[repository / "kernels.py"], speed=False)}
    assert list(found).index("a case before the others") < list(found).index("same")
    assert found["a case before the others"].status == "failed"
    assert "head died: " in found["a case before the others"].message
    assert (found["same"].status, found["new"].status) == ("equal", "new")


def test_what_is_no_revision_or_repository_is_named(repository, tmp_path):
    with pytest.raises(ValueError, match="expected a git revision of repository; got 'nowhere'"):
        compare("nowhere", modules=[repository / "kernels.py"])
    outside = tmp_path / "outside.py"
    outside.write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="--base needs a git repository"):
        compare("HEAD", modules=[outside])
    with pytest.raises(ValueError, match="outside.py is outside repository"):
        compare("HEAD", modules=[repository / "kernels.py", outside])
    with pytest.raises(ValueError, match="expects Python files; got none.py"):
        compare("HEAD", modules=[tmp_path / "none.py"])


def test_ctrl_c_removes_the_worktree_and_the_workers(repository):
    context = multiprocessing.get_context("fork")
    said, say = context.Pipe(duplex=False)

    def compared():
        # a job in the background has the signal switched off
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            compare("HEAD", modules=[repository / "kernels.py"], say=say.send)
        except KeyboardInterrupt:
            say.send("KeyboardInterrupt")

    # a kernel that never returns, so that the signal finds the comparison at work
    source = (repository / "kernels.py").read_text(encoding="utf-8")
    (repository / "kernels.py").write_text(
        source + 'case("aaa", lambda x: __import__("time").sleep(600))\n', encoding="utf-8"
    )
    process = context.Process(target=compared)
    process.start()
    assert said.poll(120) and "nothing to build" in said.recv()
    deadline = time.monotonic() + 120
    while len(workers := _children(process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    assert said.poll(120) and said.recv() == "KeyboardInterrupt"
    process.join(120)
    assert len(workers) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in workers)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]


@pytest.mark.nightly
@pytest.mark.skipif(not (revision.PACKAGE.parent / ".git").exists(), reason="needs a git checkout")
def test_this_project_against_its_last_commit():
    said = []
    results = compare("HEAD", patterns=["route/*"], say=said.append, speed=False)
    assert results and {result.status for result in results} <= {"equal", "accurate"}
    assert "native library" in said[0]
