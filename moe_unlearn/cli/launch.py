"""One command on several processes, the ranks that `torchrun` starts, or on one.

    torchrun --nproc-per-node 2 -m moe_unlearn run npo --model DIR --forget F --retain R
    torchrun --nproc-per-node 2 -m moe_unlearn run npo --mesh fsdp=2 --model DIR --forget F --retain R

The environment that torchrun sets says which rank this process is; a process that lacks a part of it is alone, since
schedulers of clusters set WORLD_SIZE for other purposes. The group of all ranks begins and ends here: nccl where there
are GPUs, one a rank, and gloo elsewhere. The first rank prints. An error ends all ranks: the rank that met it prints
it, once for all, and every rank returns its code; a rank that is killed ends the others when their connection to it
breaks or the group's time-out, two hours, is over. A command whose work ranks cannot share is refused.
"""

import contextlib
import datetime
import itertools
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import distributed

from moe_unlearn.ranks import RankError, gather
from moe_unlearn.sharding import initialised

Outcome = tuple[int, str]  # the exit code, and what stderr is told about it

REFUSED = 2  # the exit code of a command with bad input
LOST = 2  # that of a rank that lost another
_BROKEN_PIPE = 141  # 128 + SIGPIPE, as a shell sees of other tools
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# what one rank may do while the others wait, such as the delta of a model of 60 GB; nccl's own 10 minutes are too few
_LONGEST = datetime.timedelta(hours=2)
_PATIENCE = 10.0  # seconds that a rank gives the others to say or see an error
_launches = itertools.count()
_SAID, _ENDED = "said", "ended"  # counters in the store: of messages, of ranks that have seen one


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
            return _on_ranks(choose) if _one_of_several() and not initialised() else _alone(choose)
        finally:
            sys.stdout.flush()  # or else the interpreter does when it ends, and complains
    except BrokenPipeError:
        _drop_output()
        return _BROKEN_PIPE


def _one_of_several() -> bool:
    """Return whether torchrun, or who sets all that it sets, has started this process as one of several."""
    return all(os.environ.get(name) for name in _TORCHRUN) and os.environ["WORLD_SIZE"] != "1"


def _alone(choose: Callable[[], Command]) -> int:
    try:
        code, message = choose().run()
    except RankError as error:  # in a group that the caller made
        code, message = LOST, f"moe-unlearn: error: {error}"
    if message:
        print(message, file=sys.stderr)
    return code


def _drop_output() -> None:
    """Send what is printed from now on, and what has not left the buffer, nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _on_ranks(choose: Callable[[], Command]) -> int:
    # imported here because a single process never needs them
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        backend = _backend()
        store, rank, count = next(rendezvous("env://"))
    except (ValueError, distributed.DistError) as error:  # nobody can ask whether another rank has told it already
        print(f"moe-unlearn: error: the ranks cannot meet: {error}", file=sys.stderr)
        return LOST
    # a store of its own for each launch of one process, since gloo must not meet the keys of an earlier group
    own = PrefixStore(f"moe_unlearn/{next(_launches)}", store)
    with _terminal(silent=rank > 0) as say:
        message, elsewhere = "", False  # elsewhere: another rank is about to tell
        try:
            command = choose()
            code, message = REFUSED, command.refusal
            if not command.refusal:
                distributed.init_process_group(backend, store=own, rank=rank, world_size=count, timeout=_LONGEST)
                code, message = command.run()
                sys.stdout.flush()  # here, where the others can still be told that nobody reads it
                if not code:
                    gather(None)  # none ends well before all have
        except BrokenPipeError:  # nothing is said about it, by no rank
            code = _BROKEN_PIPE
            _drop_output()
        except SystemExit as ended:  # of the parser, which has told the same on every rank
            code, elsewhere = int(ended.code or 0), rank > 0
        except Exception as error:
            code, message = 1, traceback.format_exc()
            if _is_lost(error):
                code, message = LOST, f"moe-unlearn: error: rank {rank} lost another rank: {error}"
                elsewhere = isinstance(error, RankError)
        if code:
            with contextlib.suppress(distributed.DistError):  # the store is lost with its rank
                if elsewhere:
                    _wait(lambda: own.add(_SAID, 0) > 0)
                if own.add(_SAID, 1) > 1:
                    message = ""
            if message:
                say(message)
        if initialised():
            # after the message: a rank whose connection breaks has been told why, or nobody can tell it
            distributed.destroy_process_group()
        if code:
            with contextlib.suppress(distributed.DistError):
                own.add(_ENDED, 1)
                _wait(lambda: own.add(_ENDED, 0) >= count)
        return code


def _backend() -> str:
    """Return the backend for this machine, and choose this rank's GPU; ValueError for more ranks than GPUs."""
    if not torch.cuda.is_available():
        return "gloo"
    own, here, there = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if here > there:
        raise ValueError(f"expected at most {there} ranks on this machine, one a GPU; got {here}")
    torch.cuda.set_device(own)
    return "nccl"


def _is_lost(error: Exception) -> bool:
    """Return whether another rank's end is why this one failed; gloo says that with a plain RuntimeError."""
    return isinstance(error, distributed.DistError | RankError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


def _wait(until: Callable[[], bool]) -> None:
    end = time.monotonic() + _PATIENCE
    while not until() and time.monotonic() < end:
        time.sleep(0.05)


@contextlib.contextmanager
def _terminal(*, silent: bool) -> Iterator[Callable[[str], None]]:
    """Yield a function that prints to stderr; with `silent` nothing else inside prints, libraries included."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(stream) for stream in (1, 2)]
    if silent:
        # loggers and C++ libraries write to the descriptors, past sys.stderr
        with open(os.devnull, "wb") as nowhere:
            for stream in (1, 2):
                os.dup2(nowhere.fileno(), stream)

    def say(message: str) -> None:
        sys.stderr.flush()
        os.write(saved[1], (message.rstrip("\n") + "\n").encode(errors="replace"))

    try:
        yield say
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, own in zip((1, 2), saved, strict=True):
            os.dup2(own, stream)
            os.close(own)
