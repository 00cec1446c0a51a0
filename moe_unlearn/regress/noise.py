"""Record the noise of real machines once and replay it, so that verdicts face the same noise on every machine.

    python -m moe_unlearn.regress.noise --record [NAME ...] [--out PATH]

`noise.json` holds traces: the wall time of successive rounds of one piece of work, in microseconds. They were
recorded by this command on a virtual machine of two cores while several other users' work ran on it. It is wall
time, because the processor time that `timing` prefers hides most of what such neighbours do. A recording that
varies by less than MINIMUM_VARIATION is refused: record beside other work.

A `Replay` is a clock that moves only by what contenders cost: each round costs its nominal seconds times the next
reading of the trace over its median. Readings follow each other as recorded, from a random start, never shuffled,
so drift, bursts and autocorrelation are kept; a comparison that reaches the end goes on at the start.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_unlearn.files import write_text
from moe_unlearn.regress.fingerprint import fingerprint
from moe_unlearn.regress.timing import take_turns

PATH = Path(__file__).with_name("noise.json")
FORMAT = "moe-unlearn noise 1"
ROUNDS = 4000
MINIMUM_VARIATION = 0.05


@dataclass(frozen=True)
class Trace:
    """Successive round times of one piece of work, relative to their median."""

    name: str
    readings: tuple[float, ...]

    @property
    def variation(self) -> float:
        """Return the coefficient of variation: standard deviation over mean."""
        return statistics.pstdev(self.readings) / statistics.fmean(self.readings)

    @property
    def autocorrelation(self) -> float:
        """Return the lag-1 correlation of the readings' ranks, so that single outliers do not decide."""
        order = sorted(range(len(self.readings)), key=self.readings.__getitem__)
        ranks = [0.0] * len(order)
        for rank, i in enumerate(order):
            ranks[i] = float(rank)
        return statistics.correlation(ranks[:-1], ranks[1:])

    @property
    def drift(self) -> float:
        """Return the largest over the smallest median among the trace's tenths, less 1."""
        size = len(self.readings) // 10
        medians = [statistics.median(self.readings[i * size : (i + 1) * size]) for i in range(10)]
        return max(medians) / min(medians) - 1

    @property
    def tail(self) -> float:
        """Return the 99.5th percentile over the median."""
        return sorted(self.readings)[int(0.995 * len(self.readings))]


class Replay:
    """A clock, in seconds, that contenders made by `contender` move along a trace from reading `start` on."""

    def __init__(self, trace: Trace, start: int = 0):
        self.now = 0.0
        self._trace, self._next = trace.readings, start % len(trace.readings)

    def __call__(self) -> float:
        return self.now

    def contender(self, seconds: float) -> Callable[[], None]:
        """Return a contender whose work takes `seconds` on a silent machine."""

        def call() -> None:
            self.now += seconds * self._trace[self._next]
            self._next = (self._next + 1) % len(self._trace)

        return call

    def pairs(self, head: float, base: float = 1.0) -> Iterator[tuple[float, float]]:
        """Yield rounds of two contenders of these seconds, as `timing.decide` takes them."""
        contenders = {"base": self.contender(base), "head": self.contender(head)}
        for row in take_turns(contenders, warm_up=0, shortest=0, clock=self):
            yield row["base"], row["head"]


def load(path: str | Path = PATH) -> list[Trace]:
    """Return the traces of a recording; raise ValueError if the file is not one."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"expected format {FORMAT!r}; got {content['format']!r}")
        traces = []
        for name, entry in content["traces"].items():
            median = statistics.median(entry["microseconds"])
            traces.append(Trace(name, tuple(value / median for value in entry["microseconds"])))
        return traces
    except (KeyError, TypeError, AttributeError, ZeroDivisionError, statistics.StatisticsError) as error:
        raise ValueError(f"{path}: not a recording of noise: {error!r}") from error


def workloads() -> dict[str, Callable[[], object]]:
    """Return the recorded work: a GEMM, an element-wise op, a memory-bound copy, Python, many small ops, a sort."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    a, vector, source = normal(384, 384), normal(1 << 19), normal(1 << 23)
    target, small, keys = torch.empty_like(source), normal(64), normal(1 << 15)

    def python() -> int:
        table: dict[int, int] = {}
        for i in range(10_000):
            table[i % 97] = table.get(i % 89, 0) + i
        return len(table)

    def small_ops() -> torch.Tensor:
        x = small
        for _ in range(300):
            x = x * 1.0001 + small
        return x

    return {
        "gemm": lambda: a @ a,
        "elementwise": lambda: vector.tanh(),
        "copy": lambda: target.copy_(source),
        "python": python,
        "small_ops": small_ops,
        "sort": lambda: keys.sort(),
    }


def record(names: Sequence[str] = (), *, rounds: int = ROUNDS, shortest: float = 2e-3) -> dict:
    """Record the named workloads, all by default, and return the content of noise.json.

    Args:
        names: names of `workloads()`. An unknown one is a ValueError, as is a trace that varies too little.
        rounds: readings of each trace, one after another.
        shortest: seconds of a round, at least.
    """
    made = workloads()
    unknown = sorted(set(names) - set(made))
    if unknown:
        raise ValueError(f"expected workloads among {sorted(made)}; got {unknown}")
    traces = {}
    for name in names or made:
        turns = take_turns({name: made[name]}, warm_up=1.0, shortest=shortest, clock=time.perf_counter)
        seconds = [next(turns)[name] for _ in range(rounds)]
        variation = Trace(name, tuple(seconds)).variation
        if variation < MINIMUM_VARIATION:
            raise ValueError(f"{name}: expected a variation of {MINIMUM_VARIATION:.0%} or more; got {variation:.1%}")
        # times of one call, scaled to a round of at least `shortest`, need no decimals as microseconds
        scale = 1e6 * max(1.0, shortest / statistics.median(seconds))
        traces[name] = {"recorded_on": fingerprint(), "microseconds": [round(scale * s) for s in seconds]}
    return {"format": FORMAT, "clock": "wall", "traces": traces}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moe_unlearn.regress.noise", description=__doc__.split("\n")[0])
    parser.add_argument("--record", nargs="*", metavar="NAME", help="record these workloads, all by default")
    parser.add_argument("--out", type=Path, default=PATH, help="the recording to extend (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.record is not None:
        content = record(options.record)
        if options.out.exists():
            before = json.loads(options.out.read_text(encoding="utf-8"))["traces"]
            content["traces"] = before | content["traces"]
        write_text(options.out, json.dumps(content, separators=(",", ":")) + "\n")
    for trace in load(options.out):
        print(
            f"{trace.name:12} {len(trace.readings)} rounds, variation {trace.variation:.1%}, "
            f"lag-1 rank correlation {trace.autocorrelation:.2f}, drift {trace.drift:.1%}, "
            f"99.5th percentile {trace.tail:.2f} x median"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
