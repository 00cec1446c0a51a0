"""Look for the ways in which a kernel fools a measurement, by calling the kernel.

    cached result      another input in the same memory gives the old result, or other inputs give the same
    mutated input      an input holds other bits after the call
    aliased output     an output lies in the memory of an input, or of the output of an earlier call
    side-stream work   the call returns before its work is done, or another thread does it where the clock counts
                       one thread's processor time
    patched timer      a clock of Python or torch has been replaced
    impossible speed   more than TOO_FAST times as fast as a rival, or than the machine's measured ceilings allow

The first five are facts; the last is a suspicion.
`adversaries` holds a kernel for each, and `prove` shows that each is flagged.

Source: our specification; the list follows KernelBench's adversarial kernels.
"""

import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_unlearn.regress import adversaries, timing
from moe_unlearn.regress.numeric import same_bits
from moe_unlearn.regress.timing import perf_counter, synchronize, tensors, thread_time

TOO_FAST = 10.0
# a measured ceiling is itself noisy
CEILING_SLACK = 1.1
SETTLE = 0.03
_BUSY = 0.02

_CLOCKS = ("perf_counter", "perf_counter_ns", "thread_time", "process_time", "monotonic", "time", "sleep")
_EVENT = ("record", "elapsed_time", "synchronize", "query")
_ORIGINALS: dict[tuple[Any, str], Any] = {
    **{(time, name): getattr(time, name) for name in _CLOCKS},
    (torch.cuda, "Event"): torch.cuda.Event,
    (torch.cuda, "synchronize"): torch.cuda.synchronize,
    **{(torch.cuda.Event, name): getattr(torch.cuda.Event, name) for name in _EVENT},
}
_sleep, _process_time = time.sleep, time.process_time

Inputs = Callable[[int], Mapping[str, object]]


class Ceilings(NamedTuple):
    """Speeds that the machine reached in the same run: floating-point operations and bytes a second."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Finding:
    """One way in which a measurement of this kernel would mislead."""

    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


def inspect(
    function: Callable[..., object],
    inputs: Inputs,
    *,
    rival: Callable[..., object] | None = None,
    flops: float = 0.0,
    moved: float = 0.0,
    ceilings: Ceilings | None = None,
) -> list[Finding]:
    """Return every finding about `function`; an empty list means that its times may be believed.

    Args:
        function: called as function(**inputs(seed)); returns tensors, in tuples, lists or dicts.
        inputs: gives the same inputs for the same seed, others for another, newly allocated each time.
        rival: an honest implementation whose speed is compared.
        flops, moved: floating-point operations and bytes that a call needs at least, compared with `ceilings`.

    A clock that the kernel replaced is put back. Raises what `function` raises.
    """
    findings = patched_timers()
    for check in (_mutated, _aliased, _cached, _unfinished):
        findings += check(function, inputs)
    findings += patched_timers()
    if rival is not None or ceilings is not None:
        calls = {"ours": timing.rotate(function, inputs)} | ({"rival": timing.rotate(rival, inputs)} if rival else {})
        device = _device(inputs(0))
        seconds = timing.measure(calls, rounds=timing.MINIMUM_ROUNDS, warm_up=0.02, device=device)
        findings += impossible(seconds["ours"], seconds.get("rival"), flops=flops, moved=moved, ceilings=ceilings)
        findings += patched_timers()
    return list(dict.fromkeys(findings))


def patched_timers() -> list[Finding]:
    """Return findings on the clocks that were replaced, and put the clocks back, so that a second call finds none.

    A clock of Python's that was replaced before this module was imported is found because it is no builtin.
    """
    findings = []
    for (owner, name), original in _ORIGINALS.items():
        where = f"{owner.__name__ if isinstance(owner, types.ModuleType) else 'torch.cuda.Event'}.{name}"
        if getattr(owner, name) is not original:
            setattr(owner, name, original)
            findings.append(Finding("patched timer", f"{where} was replaced"))
        elif owner is time and not isinstance(original, types.BuiltinFunctionType):
            findings.append(Finding("patched timer", f"{where} is {original!r}, no builtin"))
    return findings


def impossible(
    ours: list[float],
    rival: list[float] | None = None,
    *,
    flops: float = 0.0,
    moved: float = 0.0,
    ceilings: Ceilings | None = None,
) -> list[Finding]:
    """Return findings on suspicious seconds (see `inspect`); the lists hold the rounds of `timing.measure`."""
    findings = []
    if rival is not None and (factor := timing.ratio(ours, rival).value) > TOO_FAST:
        findings.append(Finding("impossible speed", f"{factor:.3g} times as fast as its rival"))
    if ceilings is not None:
        seconds = timing.ratio([1.0] * len(ours), ours).value
        for what, work, ceiling in (("FLOP/s", flops, ceilings.flops), ("byte/s", moved, ceilings.bandwidth)):
            if work / seconds > CEILING_SLACK * ceiling:
                message = f"{work / seconds:.3g} {what}, but this machine reached {ceiling:.3g}"
                findings.append(Finding("impossible speed", message))
    return findings


def prove(device: str = "cpu") -> Iterator[tuple[str, str, list[Finding]]]:
    """Yield (name, the kind that must be found or "", what was found) for every adversary."""
    threads = torch.get_num_threads()
    for name, (kind, kernel) in adversaries.kernels(device).items():
        # with more threads the clock is the wall's, from which no other thread can hide its work
        torch.set_num_threads(1)
        try:
            found = inspect(kernel, lambda seed: adversaries.inputs(seed, device=device), rival=adversaries.honest)
        finally:
            torch.set_num_threads(threads)
        yield name, kind, found


def _mutated(function: Callable, inputs: Inputs) -> list[Finding]:
    given = inputs(0)
    before = _copies(given)
    function(**given)
    _finish(given)
    changed = [name for name, value in tensors(given).items() if not same_bits(before[name], value)]
    return [Finding("mutated input", f"the call changes {name}") for name in changed]


def _aliased(function: Callable, inputs: Inputs) -> list[Finding]:
    # all of these stay alive, so memory in use twice is shared memory
    first, second = inputs(0), inputs(1)
    earlier, later = tensors(function(**first)), tensors(function(**second))
    owners = {_memory(value): "the output of an earlier call" for value in earlier.values()}
    owners |= {_memory(value): name for name, value in tensors(second).items()}
    return [
        Finding("aliased output", f"{_output(name)} lies in the memory of {owners[_memory(value)]}")
        for name, value in later.items()
        if _memory(value) in owners and value.numel()
    ]


def _cached(function: Callable, inputs: Inputs) -> list[Finding]:
    """Compare the results of two seeds in separate memory with those of both, in turns, in one piece of memory."""

    def results(given: Mapping[str, object]) -> dict[str, Tensor]:
        outputs = tensors(function(**given))
        _finish(given)
        return _copies(outputs)

    given = inputs(0)
    old, new = results(inputs(0)), results(inputs(1))
    if _same(old, new):
        if not old or _same(tensors(given), tensors(inputs(1))):
            return []
        return [Finding("cached result", "other inputs give the same results")]
    for seed in (0, 1, 0, 1):
        if not _refill(given, inputs(seed)):
            return []
        if _same(results(given), new if seed == 0 else old):
            return [Finding("cached result", "other values in the same memory give the old results")]
    return []


def _unfinished(function: Callable, inputs: Inputs) -> list[Finding]:
    given = inputs(0)
    if _device(given).type == "cuda":
        return _unfinished_on_gpu(function, given)
    threads = set(threading.enumerate())
    outputs = tensors(function(**given))
    at_return = _copies(outputs)
    left = [thread.name for thread in threading.enumerate() if thread not in threads]
    _sleep(SETTLE)
    if not _same(at_return, outputs):
        return [Finding("side-stream work", "the outputs still change after the call has returned")]
    if left:
        return [Finding("side-stream work", f"the call leaves threads behind: {', '.join(left)}")]
    if torch.get_num_threads() == 1:
        return _elsewhere(function, given)
    return []


def _elsewhere(function: Callable, given: Mapping[str, object]) -> list[Finding]:
    """Compare all threads' processor time with this thread's while `function` runs; the clock sees only the latter."""
    start, own, all_threads = perf_counter(), thread_time(), _process_time()
    # on a busy machine the processor time comes slowly; a function that only waits would never use it up
    while _process_time() - all_threads < _BUSY and perf_counter() - start < 20 * _BUSY:
        function(**given)
    own, all_threads = thread_time() - own, _process_time() - all_threads
    # other threads of the process may wake up now and then
    if all_threads > 1.5 * own and all_threads - own > _BUSY / 4:
        share = 1 - own / all_threads
        return [Finding("side-stream work", f"other threads do {share:.0%} of the work, unseen by the clock")]
    return []


def _unfinished_on_gpu(function: Callable, given: Mapping[str, object]) -> list[Finding]:
    """Check whether the device still works when the current stream, whose events the clock reads, has finished."""
    stream = torch.cuda.current_stream()
    function(**given)
    synchronize()
    start = perf_counter()
    for _ in range(20):
        function(**given)
    stream.synchronize()
    ours = perf_counter() - start
    synchronize()
    everything = perf_counter() - start
    if everything > 1.1 * ours + 1e-4:
        message = f"{1 - ours / everything:.0%} of the work is on other streams, unseen by the clock"
        return [Finding("side-stream work", message)]
    return []


def _refill(given: Mapping[str, object], values: Mapping[str, object]) -> bool:
    """Copy `values` into the memory of `given`; return False where they do not fit into it."""
    targets, sources = tensors(given), tensors(values)
    if any(name not in sources or target.shape != sources[name].shape for name, target in targets.items()):
        return False
    try:
        for name, target in targets.items():
            target.detach().copy_(sources[name])
    except RuntimeError:  # several elements of an expanded tensor share memory
        return False
    return True


def _copies(found: Mapping[str, object]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tensors(found).items()}


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[name].detach(), b[name].detach()) for name in a)


def _memory(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _device(given: Mapping[str, object]) -> torch.device:
    return next((value.device for value in tensors(given).values()), torch.device("cpu"))


def _finish(given: Mapping[str, object]) -> None:
    if _device(given).type == "cuda":
        synchronize()


def _output(name: str) -> str:
    return f"output {name}" if name else "the output"
