"""Compare this tree with a git revision of it: the same cases run in two processes whose rounds take turns.

The revision is checked out into a temporary git worktree, which is removed whatever happens; no file of the user's
tree is touched. Its native library is copied from this tree where the sources are the same, else built there. Each
side is a `worker` process that runs its own tree's kernels. For this project both run this tree's cases; for a user's
`--module FILE.py`, each runs those of the file in its own tree.

Two processes differ in more than their kernels: where their memory lies, which core they run on. With one thread both
are bound to one core, which they use in turns, and a head that is slower must be so in CONFIRMATIONS more pairs of
fresh processes, each on another core where there is one.
"""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from moe_unlearn.regress import numeric, timing
from moe_unlearn.regress.numeric import INACCURATE
from moe_unlearn.regress.report import FINE, Result
from moe_unlearn.regress.verbs import held_against
from moe_unlearn.testing.yardstick import Baseline

PACKAGE = Path(__file__).resolve().parents[1]
CONFIRMATIONS = 2
_NATIVE_SOURCES = ("csrc", "setup.py")


class WorkerError(RuntimeError):
    """Error of one side; the message is that of its error, or the last it wrote before it died."""


def compare(
    revision: str,
    *,
    modules: Sequence[str | Path] = (),
    patterns: Sequence[str] = (),
    tags: Sequence[str] = (),
    impl: str = "auto",
    device: str | None = None,
    seed: int = 0,
    speed: bool = True,
    strict: bool = False,
    build: Sequence[str] | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> list[Result]:
    """Compare the kernels of this tree with those of `revision`, in numbers and then in speed.

    Args:
        revision: anything git resolves to a commit, in the repository of the first module, or else of this package.
        modules: files with cases, all in one repository; without any, our own cases run.
        patterns, tags, impl, device, seed, strict: as in `moe-unlearn kernels compare`.
        build: a command to run in the worktree before anything is imported from it; the default for this project
            builds its native library.
        say: called with lines of progress.

    A case of which the revision has no working kernel is "new". Raises ValueError if there is no repository, no such
    revision, or no matching case, and WorkerError where a side cannot start.
    """
    repository, files = _repository(modules)
    commit = _git(repository, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if not commit:
        raise ValueError(f"expected a git revision of {repository.name}; got {revision!r}")
    load: dict[str, object] = {"patterns": [*patterns], "tags": [*tags], "impl": impl, "device": device}
    load["threads"] = torch.get_num_threads()
    with checked_out(repository, commit) as (tree, scratch):
        say(_prepare(repository, commit, tree, build))
        sides = [_Side("head", repository, files, load, scratch), _Side("base", tree, files, load, scratch)]
        return _results(sides, seed, speed, strict, say)


@contextmanager
def checked_out(repository: Path, commit: str) -> Iterator[tuple[Path, Path]]:
    """Yield a worktree with `commit` and an empty folder beside it, both removed in the end."""
    with tempfile.TemporaryDirectory(prefix="moe-unlearn-base-", ignore_cleanup_errors=True) as folder:
        tree, scratch = Path(folder, "tree"), Path(folder, "scratch")
        scratch.mkdir()
        try:
            # the user's hooks are meant for the user's checkouts
            _run(
                ["git", "-c", f"core.hooksPath={os.devnull}", "worktree", "add", "--quiet", "--detach", tree, commit],
                repository,
            )
            yield tree, scratch
        finally:
            subprocess.run(
                ["git", "worktree", "remove", "--force", "--force", tree], cwd=repository, capture_output=True
            )
            shutil.rmtree(tree, ignore_errors=True)
            subprocess.run(["git", "worktree", "prune"], cwd=repository, capture_output=True)


def _repository(modules: Sequence[str | Path]) -> tuple[Path, list[Path]]:
    """Return the root of the repository, and the modules relative to it."""
    paths = [Path(path).resolve() for path in modules]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise ValueError(f"--module expects Python files; got {', '.join(missing)}")
    where = paths[0].parent if paths else PACKAGE
    top = _git(where, "rev-parse", "--show-toplevel")
    if not top:
        raise ValueError(f"--base needs a git repository; {where} is in none")
    root = Path(top).resolve()
    if outside := [path.name for path in paths if not path.is_relative_to(root)]:
        raise ValueError(f"--base needs all modules in one repository; {', '.join(outside)} is outside {root.name}")
    return root, [path.relative_to(root) for path in paths]


def _prepare(repository: Path, commit: str, tree: Path, build: Sequence[str] | None) -> str:
    """Build the worktree and return one line that says what was done."""
    ours = all((tree / name).exists() for name in ("moe_unlearn", *_NATIVE_SOURCES))
    if build is None and not ours:
        return f"base {commit[:9]}: nothing to build"
    if build is None:
        others = _git(repository, "ls-files", "--others", "--exclude-standard", "--", *_NATIVE_SOURCES)
        if not others and _git(repository, "diff", "--stat", commit, "--", *_NATIVE_SOURCES) == "":
            libraries = [*(repository / "moe_unlearn").glob("_C_*")]
            for library in libraries:
                shutil.copy2(library, tree / "moe_unlearn")
            what = "copied, its sources are the same" if libraries else "not built here, so not there either"
            return f"base {commit[:9]}: native library {what}"
        build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(build, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        return f"base {commit[:9]}: not built, {build[0]} failed: {last}"
    return f"base {commit[:9]}: built"


def _results(sides: list["_Side"], seed: int, speed: bool, strict: bool, say: Callable) -> list[Result]:
    with ExitStack() as stack:
        # head starts first, because nothing else needs to start if it cannot
        head, base = (stack.enter_context(side) for side in sides)
        if not head.cases:
            raise ValueError("no case of this tree matches; see kernels list")
        results = []
        for name in head.cases:
            result = _compared(name, base, head, seed, speed, strict)
            results.append(result)
            for side in sides:
                if side.dead:
                    side.restart()
            say(f"{name}: {result.status}" + (f", {result.speed}" if result.speed else ""))
        return results


def _compared(name: str, base: "_Side", head: "_Side", seed: int, speed: bool, strict: bool) -> Result:
    try:
        ours = head.evaluate(name, seed)
    except WorkerError as error:
        return Result(name, "failed", str(error))
    if name not in base.cases:
        return Result(name, "new", "the base has no such case")
    try:
        theirs = base.evaluate(name, seed)
    except WorkerError as error:
        return Result(name, "new", f"the base fails: {error}")
    try:
        result = held_against(name, theirs, ours, strict=strict)
    except WorkerError as error:
        return Result(name, "invalid", str(error))
    if not speed or result.status == "changed":
        return result
    found = _decide(name, base, head, seed, result.status != INACCURATE)
    slower = found.verdict == "slower" and result.code == FINE
    return replace(result, speed=str(found), status="slower" if slower else result.status)


def _decide(name: str, base: "_Side", head: "_Side", seed: int, numerics: bool) -> timing.Comparison:
    prints = base.fingerprint, head.fingerprint
    found = timing.decide(_pairs(name, base, head, seed), numerics=numerics, fingerprints=prints)
    for _ in range(CONFIRMATIONS):
        if found.verdict != "slower":
            break
        base.restart()
        head.restart()
        again = timing.decide(_pairs(name, base, head, seed))
        if again.verdict != "slower":
            again = replace(again, verdict="same", reason="slower in one pair of processes, not in the next")
        found = again
    return found


def _pairs(name: str, base: "_Side", head: "_Side", seed: int) -> Iterator[tuple[float, float]]:
    """Yield rounds for `timing.decide`; the clock moves by what the workers report."""
    now = 0.0

    def contender(side: "_Side") -> Callable[[], None]:
        def call() -> None:
            nonlocal now
            now += side.ask("reading", calls=calls[side.name])["seconds"]

        return call

    calls = timing.common({side.name: side.ask("prepare", case=name, seed=seed)["calls"] for side in (base, head)})
    contenders = {"base": contender(base), "head": contender(head)}
    for row in timing.take_turns(contenders, warm_up=0, shortest=0, clock=lambda: now):
        yield row["base"], row["head"]


@dataclass
class _Side:
    """Worker process on one tree."""

    name: str
    tree: Path
    files: list[Path]
    load: dict
    scratch: Path
    starts: int = 0
    dead: bool = False
    _process: subprocess.Popen | None = None

    def __enter__(self) -> "_Side":
        self._start()
        return self

    def __exit__(self, *reason: object) -> None:
        if self._process is None:
            return
        # kernels may have started processes of their own
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in filter(None, (self._process.stdin, self._process.stdout)):
            with suppress(BrokenPipeError):  # data of a request that a dead worker never read
                pipe.close()
        self._process = None

    def restart(self) -> None:
        self.__exit__()
        self.starts += 1
        self.dead = False
        self._start()

    def _start(self) -> None:
        package = self.tree / "moe_unlearn" if (self.tree / "moe_unlearn" / "__init__.py").exists() else PACKAGE
        worker = Path(__file__).with_name("worker.py")
        self._errors = tempfile.TemporaryFile(dir=self.scratch)
        try:
            # a Ctrl-C between the start and its result would leave a process without an owner
            with _interrupts_held():
                self._process = subprocess.Popen(
                    [sys.executable, "-P", worker, self.tree, package, PACKAGE],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._errors,
                    cwd=self.tree,
                    text=True,
                    start_new_session=True,
                    env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
                )
            modules = [str(self.tree / file) for file in self.files if (self.tree / file).exists()]
            if self.files and not modules:
                self.cases, self.fingerprint = [], {}
                return
            answer = self.ask("load", modules=modules, start=self.starts, **self.load)
        except OSError as error:
            self.__exit__()
            raise WorkerError(f"{self.name} cannot be started: {error}") from error
        except BaseException:
            self.__exit__()
            raise
        self.cases, self.fingerprint = answer["cases"], answer["fingerprint"]

    def ask(self, what: str, **arguments: object) -> dict:
        """Return the worker's answer; raise WorkerError where it has none."""
        try:
            worker: Any = self._process
            worker.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._errors.seek(0)
            self.dead = True
            last = self._errors.read()[-2000:].decode(errors="replace").strip()
            raise WorkerError(f"{self.name} died: {last or 'without a word'}")
        answer: dict = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name}: {answer['error']}")
        return answer

    def evaluate(self, case: str, seed: int) -> numeric.Evaluation:
        path = self.scratch / f"{self.name}.safetensors"
        inputs = self.ask("evaluate", case=case, seed=seed, out=str(path))["inputs"]
        parts: dict[str, dict] = {"actual": {}, "gold": {}}
        for key, value in load_file(path).items():
            part, _, output = key.partition(" ")
            parts[part][output] = value
        # the reference itself stays in the worker; its random roundings are fetched only where a verdict needs them
        baseline = {k: Baseline(v, functools.partial(self._rounded, k)) for k, v in parts["actual"].items()}
        return numeric.Evaluation(inputs, parts["actual"], baseline, parts["gold"])

    def _rounded(self, output: str) -> Tensor:
        path = self.scratch / f"{self.name}-rounded.safetensors"
        self.ask("rounded", output=output, out=str(path))
        return load_file(path)["rounded"]


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Delay a Ctrl-C inside until the end; other threads receive none, so nothing is delayed there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple] = []
    former = signal.signal(signal.SIGINT, lambda *event: held.append(event))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
        if held and callable(former):
            former(*held[0])


def _git(where: Path, *arguments: str) -> str | None:
    """Return what git prints, or None where it fails."""
    # bytes, because a path need not be text of the locale
    done = subprocess.run(["git", "-C", where, *arguments], capture_output=True)
    return None if done.returncode else os.fsdecode(done.stdout).strip()


def _run(command: Sequence, where: Path) -> None:
    done = subprocess.run(command, cwd=where, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(map(str, command[:4]))}: {done.stderr.strip()}")
