"""Compare speed honestly: rounds of the contenders take turns, and a verdict needs a shown change that matters.

**Measuring.** A round times a batch of calls of each contender; the order is reversed every time, so that drift
of the machine cancels. With `repeats` a round times each contender that often, in turns, and the fastest reading
counts, because interruptions only ever add time. Before the first round every contender runs for `warm_up` seconds,
and a contender too short for the clock is called several times a round. The clock is the thread's processor time
where torch has one thread (other work on the machine is left out), wall time where it has more, and CUDA events on a
GPU. `rotate` lets every call meet inputs that the caches no longer hold.

**Deciding.** The estimate is the median of the ratios head / base, paired by round, with the percentile bootstrap
interval of that median. The bootstrap distribution of a median is known: the k-th smallest of n values is reached
by a resample's median with the probability that a Binomial(n, k / n) is at least n / 2. So the interval is that
of infinitely many resamples, and no random number is drawn. A change is reported if the interval excludes 1 *and* the
median lies beyond `threshold`.

`decide` adds rounds until the question is answered. It looks after LOOKS rounds and stops once the interval lies
wholly on one side of each of 1 + threshold and 1 / (1 + threshold). Looking repeatedly inflates false alarms, so the
permitted error is split evenly among the looks (Bonferroni). This bounds the total by 1 - confidence whatever happens
between them, as far as the rounds' ratios are independent. On real noise they are not, and
`moe_unlearn.regress.selftest` measures what holds: on each of the six recordings of `noise`, of variation 6 % to 57
%, no false alarm in 1,000 comparisons of equals, and all of 1,000 slow-downs by 10 % found, in 8 to 62 rounds on
average. (A recording has 4,000 readings, so these comparisons share readings.) A `verdict` on a fixed number of
rounds has no such bound: at 7 rounds of one reading the worst of the recordings gives 1.3 % false alarms, and a
slow-down by 10 % is found in 1 % to 94 % of the comparisons.

Source: our specification; interleaving, the interval and the threshold follow the practice of FLA's and
pytest-benchmark's users.
"""

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from moe_unlearn.regress.fingerprint import mismatch

Verdict = Literal["slower", "faster", "same", "refused", "suppressed"]

THRESHOLD = 0.05
CONFIDENCE = 0.99
MINIMUM_ROUNDS = 5
# measured on the recordings of noise.py: with one reading a round, a busy machine needs about four times the rounds
REPEATS = 3
WARM_UP = 0.2
SHORTEST = 2e-3
LOOKS = (8, 16, 32, 64, 128, 256)

# kept from import time, so that a kernel that replaces the modules' attributes cannot change what we read
perf_counter, thread_time, synchronize = time.perf_counter, time.thread_time, torch.cuda.synchronize
_Event, _record, _elapsed_time = torch.cuda.Event, torch.cuda.Event.record, torch.cuda.Event.elapsed_time


class Interval(NamedTuple):
    """Estimate with its confidence limits."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Outcome of `decide`; `reason` says why no verdict on speed was given, or how well the rounds resolve."""

    verdict: Verdict
    ratio: Interval | None
    rounds: int
    reason: str = ""

    def __str__(self) -> str:
        if self.ratio is None:
            return f"{self.verdict}: {self.reason}"
        text = "{:.3f} x base (from {:.3f} to {:.3f})".format(*self.ratio)
        return f"{self.verdict}: {text}, {self.rounds} rounds" + (f"; {self.reason}" if self.reason else "")


def measure(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 7,
    repeats: int = 1,
    warm_up: float = WARM_UP,
    shortest: float = SHORTEST,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] | None = None,
) -> dict[str, list[float]]:
    """Return the seconds of one call in every round, for each contender; the lists are paired by round.

    Args:
        contenders: functions without arguments; their results are dropped.
        rounds: at least MINIMUM_ROUNDS for a verdict, but fewer are allowed.
        repeats: readings of each contender in a round; the smallest counts.
        warm_up: wall seconds that each contender runs first; at least one call.
        shortest: seconds; a contender that takes less is called often enough to fill them in every round.
        device: where the work runs; its type decides the clock where `clock` is None (module docstring).
        clock: returns seconds; for a GPU it must itself wait for the device.

    Raises ValueError without contenders, rounds or repeats.
    """
    if not contenders or min(rounds, repeats) < 1:
        got = f"{len(contenders)}, {rounds} and {repeats}"
        raise ValueError(f"expected at least one contender, one round and one repeat; got {got}")
    turns = take_turns(contenders, repeats=repeats, warm_up=warm_up, shortest=shortest, device=device, clock=clock)
    table = list(itertools.islice(turns, rounds))
    return {name: [row[name] for row in table] for name in contenders}


def take_turns(
    contenders: Mapping[str, Callable[[], object]],
    *,
    repeats: int = REPEATS,
    warm_up: float = WARM_UP,
    shortest: float = SHORTEST,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] | None = None,
) -> Iterator[dict[str, float]]:
    """Yield the rounds of `measure`, one after another without end."""
    watch = stopwatch(device, clock)
    calls = common({name: warm(function, watch, warm_up, shortest) for name, function in contenders.items()})
    order = list(contenders)
    while True:
        fastest = dict.fromkeys(contenders, math.inf)
        for _ in range(repeats):
            for name in order:
                fastest[name] = min(fastest[name], watch(contenders[name], calls[name]) / calls[name])
            order.reverse()
        if repeats % 2 == 0:
            order.reverse()
        yield fastest


def stopwatch(
    device: torch.device | str = "cpu", clock: Callable[[], float] | None = None
) -> Callable[[Callable[[], object], int], float]:
    """Return a function (function, calls) -> seconds that these calls take together, by the clock of `measure`."""
    if clock is None and torch.device(device).type == "cuda":
        return _cuda_seconds
    clock = clock or (thread_time if torch.get_num_threads() == 1 else perf_counter)

    def seconds(function: Callable[[], object], calls: int) -> float:
        turns = itertools.repeat(None, calls)
        start = clock()
        for _ in turns:
            function()
        return clock() - start

    return seconds


def _cuda_seconds(function: Callable[[], object], calls: int) -> float:
    start, end = _Event(enable_timing=True), _Event(enable_timing=True)
    synchronize()
    _record(start)
    for _ in range(calls):
        function()
    _record(end)
    # waits for all streams, because work left on another one must not run into the next contender's round
    synchronize()
    return float(_elapsed_time(start, end)) / 1e3


def warm(
    function: Callable[[], object],
    watch: Callable[[Callable[[], object], int], float],
    warm_up: float = WARM_UP,
    shortest: float = SHORTEST,
) -> int:
    """Run `function` for `warm_up` wall seconds, at least once; return the calls that fill `shortest` seconds."""
    start, fastest, calls = perf_counter(), math.inf, 1
    while True:
        fastest = min(fastest, watch(function, calls) / calls)
        # one call may be shorter than the clock can show
        needed = math.ceil(shortest / fastest) if fastest > 0 else 2 * calls
        if perf_counter() - start >= warm_up and (fastest > 0 or calls >= 1 << 16):
            return max(1, min(needed, 1 << 20))
        calls = max(1, min(needed, 2 * calls))


def common(calls: Mapping[str, int]) -> dict[str, int]:
    """Return the calls of a round, raised to the largest number where that is at most 4 times as many.

    The fastest of several long batches does not compare with that of as many short ones, so contenders that are about
    as fast take the same number of calls, whatever noise there was when it was chosen.
    """
    most = max(calls.values())
    return {name: most if most <= 4 * number else number for name, number in calls.items()}


def rotate(
    function: Callable[..., object],
    make: Callable[[int], Mapping[str, object]],
    copies: int | None = None,
) -> Callable[[], object]:
    """Return a function without arguments that calls `function(**make(i))` for i = 0, 1, ..., copies - 1, 0, ...

    The inputs are made here, once. If `copies` is None, there are as many as together fill twice the last-level cache
    of their device, from 2 to 64, so that no call finds its inputs in the cache.
    """
    inputs = [make(0)]
    if copies is None:
        found = list(tensors(inputs[0]).values())
        size = sum(tensor.numel() * tensor.element_size() for tensor in found)
        device = found[0].device if found else torch.device("cpu")
        copies = min(64, max(2, math.ceil(2 * cache_bytes(device) / max(size, 1))))
    inputs += [make(i) for i in range(1, copies)]
    following = itertools.cycle(inputs)
    return lambda: function(**next(following))


def tensors(value: object, path: str = "") -> dict[str, torch.Tensor]:
    """Return the tensors in nested dicts, lists and tuples, by their path, such as "masks.1"."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    found: dict[str, torch.Tensor] = {}
    for key, part in parts:
        found |= tensors(part, f"{path}.{key}" if path else str(key))
    return found


def cache_bytes(device: torch.device | str) -> int:
    """Return the size of the last-level cache, or 32 MiB where the system does not tell."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [
        path.read_text(encoding="utf-8").strip()
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max((int(size.removesuffix("K")) << 10 for size in sizes if size.endswith("K")), default=32 << 20)


def ratio(ours: Sequence[float], rival: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Return the median over the rounds of rival / ours, with its bootstrap interval; above 1 where ours is faster.

    Raises ValueError unless both have the same number of rounds, at least one, of positive seconds.
    """
    if not len(ours) == len(rival) >= 1:
        raise ValueError(f"expected the same number of rounds, at least 1; got {len(ours)} and {len(rival)}")
    if not min(*ours, *rival, math.inf) > 0:
        raise ValueError(f"expected positive seconds; got {min(*ours, *rival, math.inf)}")
    values = sorted(r / o for o, r in zip(ours, rival, strict=True))
    k = _lowest_rank(len(values), (1 - confidence) / 2)
    return Interval(statistics.median(values), values[k], values[-1 - k])


@functools.cache
def _lowest_rank(n: int, tail: float) -> int:
    """Return the index of the smallest of n sorted values that a resample's median reaches with probability > `tail`.

    The median is among the k smallest values if half of its n draws are.
    """
    for k in range(1, n // 2 + 1):
        p = k / n
        reached = math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(math.ceil(n / 2), n + 1))
        if reached > tail:
            return k - 1
    return 0


def verdict(
    base: Sequence[float], head: Sequence[float], *, threshold: float = THRESHOLD, confidence: float = CONFIDENCE
) -> Verdict:
    """Return "slower" or "faster" if the interval of head / base excludes 1 and its median exceeds the threshold.

    Otherwise return "same".

    Args:
        base, head: seconds of the rounds, paired; at least MINIMUM_ROUNDS, ValueError otherwise.
        threshold: relative change below which nothing is reported.
    """
    if min(len(base), len(head)) < MINIMUM_ROUNDS:
        raise ValueError(f"expected at least {MINIMUM_ROUNDS} rounds; got {len(base)} and {len(head)}")
    return _verdict(ratio(base, head, confidence=confidence), threshold)


def _verdict(found: Interval, threshold: float) -> Verdict:
    if found.low > 1 and found.value > 1 + threshold:
        return "slower"
    if found.high < 1 and found.value < 1 / (1 + threshold):
        return "faster"
    return "same"


def decide(
    pairs: Iterable[tuple[float, float]],
    *,
    threshold: float = THRESHOLD,
    confidence: float = CONFIDENCE,
    numerics: bool = True,
    fingerprints: tuple[Mapping[str, str], Mapping[str, str]] | None = None,
) -> Comparison:
    """Take rounds (base seconds, head seconds) from `pairs` until they decide, at most LOOKS[-1] of them.

    Args:
        pairs: as from `take_turns`; if it ends early, the last look is at what came. It is not touched where no
            verdict on speed is given.
        numerics: whether the numeric gate is green; the speed of wrong results is "suppressed".
        fingerprints: of the devices of base and head; where they differ the verdict is "refused" and names the
            fields.

    Raises ValueError where fewer than MINIMUM_ROUNDS came.
    """
    if not numerics:
        return Comparison("suppressed", None, 0, "the results are wrong, so their speed says nothing")
    if fingerprints is not None and (fields := mismatch(*fingerprints)):
        return Comparison("refused", None, 0, "measured on different devices: " + "; ".join(fields))
    error = (1 - confidence) / len(LOOKS)
    rounds = iter(pairs)
    base: list[float] = []
    head: list[float] = []
    for look in LOOKS:
        for one, other in itertools.islice(rounds, look - len(base)):
            base.append(one)
            head.append(other)
        found = ratio(base, head, confidence=1 - error) if len(base) >= MINIMUM_ROUNDS else None
        if len(base) < look or (found and _answered(found, threshold)):
            break
    if found is None:
        raise ValueError(f"expected at least {MINIMUM_ROUNDS} rounds; got {len(base)}")
    width = found.high / found.low - 1
    reason = "" if _answered(found, threshold) else f"noisy: the interval spans {width:.0%}"
    return Comparison(_verdict(found, threshold), found, len(base), reason)


def _answered(found: Interval, threshold: float) -> bool:
    """Return whether the interval contains neither limit of what counts as a change."""
    return not any(found.low <= limit <= found.high for limit in (1 + threshold, 1 / (1 + threshold)))
