"""Start processes that are ended with all they started and that do not outlive their starter."""

import ctypes
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def start(
    command: Sequence[str],
    *,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    output: IO | int | None = None,
    **options,
) -> subprocess.Popen:
    """Start a command in a session of its own; the system kills it once the calling process is dead.

    Args:
        output: where both of its outputs go; `options` are further ones of `subprocess.Popen`.
    """
    if output is not None:
        options |= {"stdout": output, "stderr": subprocess.STDOUT}
    die = functools.partial(_die_with, os.getpid())
    return subprocess.Popen(command, cwd=cwd, env=environment, start_new_session=True, preexec_fn=die, **options)


def _die_with(parent: int) -> None:
    """Ask the system to kill this process when its parent dies, since a session of its own would survive."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the request
        os._exit(1)


def stop(process: subprocess.Popen, grace: float = 0.0) -> None:
    """End a process of `start` and all it started; with `grace`, ask it first and wait that many seconds."""
    for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, None)):
        if number == signal.SIGTERM and not grace:
            continue
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            pass
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
