"""One command on several processes, the ranks that `torchrun` starts, or on one.

    torchrun --nproc-per-node 2 -m moe_unlearn run npo --model DIR --forget F --retain R
    torchrun --nproc-per-node 2 -m moe_unlearn run npo --mesh fsdp=2 --model DIR --forget F --retain R

The environment that torchrun sets says which rank this process is; a process that lacks a part of it is alone, since
schedulers of clusters set WORLD_SIZE for other purposes. `on_ranks` runs the command of a rank. A process that is alone
loads torch when its command does.
"""

import atexit
import os
import sys
import threading
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from moe_unlearn.errors import RankError

Outcome = tuple[int, str]  # the exit code, and what stderr is told about it

REFUSED = 2  # the exit code of a command with bad input
LOST = 2  # that of a rank that lost another
BROKEN_PIPE = 141  # 128 + SIGPIPE, as a shell sees of other tools
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Command(NamedTuple):
    """Holds what a process is to do."""

    run: Callable[[], Outcome]
    refusal: str = ""  # why several ranks cannot do it; empty if they can


def launched(choose: Callable[[], Command]) -> int:
    """Run the command that `choose` finds on this process, perhaps one of several ranks; return its exit code.

    Its message is printed, and a rank's exception with its traceback; then the code is 1. If whoever reads the output
    has closed it, as `head` does, the rest is dropped without a word.
    """
    try:
        try:
            return _on_ranks(choose) if _one_of_several() else _alone(choose)
        finally:
            sys.stdout.flush()  # or else the interpreter does when it ends, and complains
    except BrokenPipeError:
        drop_output()
        return BROKEN_PIPE


def end(code: int) -> NoReturn:
    """End this process, whose command has returned `code`, after what was registered to run at its exit.

    A rank does not take its interpreter down. A thread of gloo asks for the interpreter's lock to drop the tensors of a
    collective that is over, and one that still waits when the interpreter ends makes it end by SIGABRT
    (pytorch#190489). A group that anything still refers to, as torch's modules and meshes do, keeps such threads after
    destroy_process_group. So a rank runs no caller's `finally`, no finaliser of an open file and no exit function of C.
    """
    if not _one_of_several():
        sys.exit(code)
    threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter does before its exit functions
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _one_of_several() -> bool:
    """Return whether torchrun, or who sets all that it sets, has started this process as one of several."""
    return all(os.environ.get(name) for name in _TORCHRUN) and os.environ["WORLD_SIZE"] != "1"


def _on_ranks(choose: Callable[[], Command]) -> int:
    # imported here, since torch takes seconds
    from moe_unlearn.cli import on_ranks
    from moe_unlearn.sharding import initialised

    return _alone(choose) if initialised() else on_ranks.run(choose)


def _alone(choose: Callable[[], Command]) -> int:
    try:
        code, message = choose().run()
    except RankError as error:  # in a group that the caller made
        code, message = LOST, f"moe-unlearn: error: {error}"
    if message:
        print(message, file=sys.stderr)
    return code


def drop_output() -> None:
    """Send what is printed from now on, and what has not left the buffer, nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
