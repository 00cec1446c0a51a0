"""A forked child: what it returns, or of what it died and in which program of which kernel."""

import faulthandler
import json
import mmap
import os
import signal
from collections.abc import Callable, Iterable

import torch

# a child writes here what it is about to run, the parent reads it when the child is dead
_black_box = mmap.mmap(-1, mmap.PAGESIZE)


def about_to_run(text: str) -> None:
    """Leave word of what runs next, for the case that it kills the process."""
    encoded = text.encode() + b"\0"
    _black_box[: len(encoded)] = encoded


def in_child(function: Callable[[], Iterable[str]], seconds: int = 120) -> list[str]:
    """Return what `function` yields in a forked child; its death or exception as a finding of its own."""
    about_to_run("")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            faulthandler.disable()
            torch.set_num_threads(1)  # the threads of an OpenMP pool do not survive a fork
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(seconds)
            with os.fdopen(write, "w", encoding="utf-8") as pipe:
                try:
                    for finding in function():
                        print(json.dumps(finding), file=pipe, flush=True)
                except BaseException as error:
                    print(json.dumps(f"{_last_program()}raised {type(error).__name__}: {error}"), file=pipe)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as pipe:
        found = [json.loads(line) for line in pipe]
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        found.append(f"{_last_program()}died of {signal.Signals(os.WTERMSIG(status)).name}")
    return found


def _last_program() -> str:
    text = _black_box[:].partition(b"\0")[0].decode()
    return text and f"{text}: "
