"""Keeps a second run out of a folder that one is writing."""

import contextlib
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from moe_unlearn.files import make_private

NAME = "lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`, which is made private if need be, for this process: its file `lock` says who does.

    The file has the process's id, its host and when it started. One that a killed process has left on this host is
    replaced, and that is said; one of another host is not, since nobody here knows what became of it. Raises
    BlockingIOError, which says who holds the folder. A folder that was made for it and is still empty is removed.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    make_private(folder)
    path = folder / NAME
    try:
        file = _opened(path)
        try:
            _take(file, path)
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
        finally:
            os.close(file)
    finally:
        for empty in made:
            with contextlib.suppress(OSError):
                empty.rmdir()


def _opened(path: Path) -> int:
    """Return a descriptor of the file at `path`, which this process alone has locked."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
                return file
        except OSError:
            refusal = _held(path, _owner(file))
            os.close(file)
            raise refusal from None
        os.close(file)  # who held it has removed the file meanwhile


def _take(file: int, path: Path) -> None:
    """Write this process into the lock file, unless it names one that runs, or one of another host."""
    former, host, started = _owner(file), socket.gethostname(), _started(os.getpid())
    if former:
        if former.get("host") != host or _started(former.get("pid")) == former.get("started"):
            raise _held(path, former)
        print(f"{path} was left by process {former.get('pid')}, which has ended; it is replaced", file=sys.stderr)
    own = {"pid": os.getpid(), "host": host, "started": started, "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(own).encode(), 0)
    os.fsync(file)


def _owner(file: int) -> dict:
    """Return what a lock file says; empty for one that says nothing that can be read."""
    try:
        said = json.loads(os.pread(file, 1000, 0))
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _started(pid: object) -> str:
    """Return when a process of this host started, in ticks since the host did; empty for one that does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _held(path: Path, owner: dict) -> BlockingIOError:
    """Return the error that says who holds a lock file."""
    who = "another process"
    if "pid" in owner:
        who = f"process {owner['pid']} on {owner.get('host')}, since {owner.get('since')},"
    return BlockingIOError(
        f"{who} is writing {path.parent}: wait for it, or give another --out; if it is gone, remove {path}"
    )
