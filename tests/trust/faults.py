"""A disk that fails, or a process that dies, at the n-th of the calls by which a verb changes files.

The calls are counted in a forked process that runs the command line: what opens a file to write, writes to it, syncs
it, and what makes, renames or removes a file or a folder, below one folder. Python's own calls are wrapped or audited.
Libraries that write past Python (Rust, C++) meet a full disk too: the kernel lets no file of the process grow.
"""

import builtins
import errno
import gc
import io
import os
import resource
import stat
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_unlearn import backend
from moe_unlearn.cli.launch import REFUSED
from moe_unlearn.cli.main import main
from moe_unlearn.regress.report import CORRUPT

KILLED = 137
TORN = "torn"  # half of what is written arrives, then the process is killed
ERRORS = {"full": errno.ENOSPC, "broken": errno.EIO, "denied": errno.EACCES, "killed": None, TORN: None}
CRASHES = tuple(kind for kind, code in ERRORS.items() if code is None)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = ("os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate")
_FREES = ("os.remove", "os.rmdir")  # a full disk lets these pass


@dataclass(frozen=True)
class Fault:
    """Names what fails at the call of number `at`, counted from 0; a full disk stays full, others fail once."""

    kind: str
    at: int


@dataclass(frozen=True)
class Attempt:
    """How a command ended: its exit code, what it printed to stderr, and how many calls changed files."""

    code: int
    said: str
    calls: int

    def refused(self) -> bool:
        """Return whether it ended as bad input does: its exit code, one line that says why, and no traceback."""
        told = [line for line in self.said.splitlines() if "error: " in line or "corrupt store: " in line]
        return self.code in (REFUSED, CORRUPT) and len(told) == 1 and "Traceback" not in self.said


def attempt(arguments: Sequence[str], folder: Path, fault: Fault | None = None) -> Attempt:
    """Run the command line in `folder`, in a fork of this process, and let its files below `folder` fail."""
    counted, said = os.pipe(), os.pipe()
    backend.unusable("cpu")  # imports the kernels, which every fork would do for itself
    child = os.fork()
    if not child:
        _live(arguments, folder.resolve(), fault, counted[1], said[1])
    for pipe in (counted, said):
        os.close(pipe[1])
    with (
        os.fdopen(said[0], encoding="utf-8", errors="replace") as printed,
        os.fdopen(counted[0], encoding="utf-8") as number,
    ):
        text = printed.read()
        calls = int(number.read() or 0)
    return Attempt(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text, calls)


def _live(arguments: Sequence[str], folder: Path, fault: Fault | None, counted: int, said: int) -> None:
    code = 1
    gc.freeze()  # a collection would write to, and so copy, every object that the parent has made
    try:
        os.chdir(folder)
        os.dup2(said, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout, sys.stderr = (open(stream, "w", encoding="utf-8", closefd=False) for stream in (1, 2))
        torch.set_num_threads(1)  # the threads of an OpenMP pool do not survive a fork
        (folder / "tmp").mkdir(exist_ok=True)
        tempfile.tempdir = str(folder / "tmp")
        disk = _Disk(str(folder), fault)
        disk.install()
        try:
            code = main(arguments)
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            disk.fault = None
            os.write(counted, str(disk.calls).encode())
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


class _Disk:
    """Counts the calls that change files below `root`, and makes them fail as `fault` says."""

    def __init__(self, root: str, fault: Fault | None):
        self._root, self.fault, self.calls = root + os.sep, fault, 0
        self._is_full = False

    def install(self) -> None:
        """Wrap what Python writes with, in this process, for good."""
        disk, opened = self, io.open

        class Faulty(io.FileIO):
            """A file whose writes count."""

            def write(self, data) -> int:  # type: ignore[no-untyped-def]
                disk.changes(lambda: super(Faulty, self).write(memoryview(data).cast("B")[: len(data) // 2]))
                return super().write(data)

            def truncate(self, size=None) -> int:  # type: ignore[no-untyped-def]
                disk.changes()
                return super().truncate(size)

        def open_(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):  # type: ignore[no-untyped-def]
            written = not mode.isascii() or set(mode) & set("wxa+")
            if not written or not self._below(file) and opener is None:
                return opened(file, mode, buffering, encoding, errors, newline, closefd, opener)
            raw = Faulty(file, mode.replace("b", "").replace("t", ""), closefd, opener)
            if not self._below(raw.fileno()):
                raw.close()
                return opened(file, mode, buffering, encoding, errors, newline, closefd, opener)
            if buffering == 0:
                return raw
            buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

        builtins.open = io.open = open_  # type: ignore[assignment]
        for name in ("write", "pwrite", "fsync", "fdatasync", "ftruncate"):
            setattr(os, name, self._on_descriptor(getattr(os, name)))
        sent = os.sendfile
        os.sendfile = lambda out, *rest: (self._below(out) and self.changes(), sent(out, *rest))[1]  # type: ignore[assignment]
        sys.addaudithook(self._heard)

    def changes(self, half: Callable[[], object] = lambda: None, *, frees: bool = False) -> None:
        """Count one call, or fail instead of it; `half` does a half of what it would write."""
        now, fault = self.calls, self.fault
        self.calls += 1
        if fault is None or now < fault.at or frees and fault.kind == "full":
            return
        if fault.kind == "full":
            if not self._is_full:
                self._is_full = True
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        elif now > fault.at:
            return
        if (code := ERRORS[fault.kind]) is not None:
            raise OSError(code, os.strerror(code))
        if fault.kind == TORN:
            half()
        os._exit(KILLED)

    def _on_descriptor(self, call: Callable) -> Callable:  # type: ignore[type-arg]
        def counted(descriptor, *rest):  # type: ignore[no-untyped-def]
            if self._below(descriptor):
                self.changes()
            return call(descriptor, *rest)

        return counted

    def _heard(self, event: str, given: tuple) -> None:  # type: ignore[type-arg]
        if event == "open":
            path, _, flags = given
            if flags & _WRITES and self._below(path):
                self.changes()
        elif event in _CHANGES or event in _FREES:
            if any(self._below(path) for path in given if isinstance(path, str | bytes | os.PathLike)):
                self.changes(frees=event in _FREES)

    def _below(self, file: object) -> bool:
        """Return whether a path, or a descriptor of a file, is below the folder that counts."""
        if isinstance(file, int):
            try:
                if not stat.S_ISREG(os.fstat(file).st_mode):
                    return False
                file = os.readlink(f"/proc/self/fd/{file}")
            except OSError:
                return False
        try:
            path = os.fsdecode(file)  # type: ignore[arg-type]
        except TypeError:
            return False
        return os.path.join(os.getcwd(), path).startswith(self._root)
