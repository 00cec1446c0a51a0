"""Runs one command on one of the ranks that `torchrun` has started.

The group of all ranks begins and ends here: nccl where there are GPUs, one a rank, and gloo elsewhere. The first rank
prints. An error ends all ranks: the rank that met it prints it, once for all, and every rank returns its code; a rank
that is killed ends the others when their connection to it breaks or the group's time-out, two hours, is over. A command
whose work ranks cannot share is refused.
"""

import contextlib
import datetime
import itertools
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from moe_unlearn.cli.launch import BROKEN_PIPE, LOST, REFUSED, Command, drop_output
from moe_unlearn.errors import RankError
from moe_unlearn.ranks import gather
from moe_unlearn.sharding import initialised

# what one rank may do while the others wait, such as the delta of a model of 60 GB; nccl's own 10 minutes are too few
_LONGEST = datetime.timedelta(hours=2)
_PATIENCE = 10.0  # seconds that a rank gives the others to say or see an error
_launches = itertools.count()
_SAID, _ENDED = "said", "ended"  # counters in the store: of messages, of ranks that have seen one


def run(choose: Callable[[], Command]) -> int:
    """Run the command that `choose` finds on this rank, with all others that torchrun has started; return its code."""
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
            code = BROKEN_PIPE
            drop_output()
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
