"""Measure how honest the verdicts are: false alarms among equals, and the slow-downs and bugs that are found.

    python -m moe_unlearn.regress.selftest [--real] [--comparisons N]

Performance: a kernel is compared with itself, and with itself 10 % slower, on the recorded noise of `noise.py`
(each trace by itself, so a limit holds on the worst) through the same code that times kernels. Any verdict but "same"
among equals counts as a false alarm. With `--real` a real kernel runs on the real clock instead.

Defences: a kernel for each way to fool a measurement must be flagged, and an honest kernel must pass.

Numbers: each bug of `seeded.py` must be found. Correct results in many orders of sums are judged by the harshest
yardstick in `alarms.py`: none may be called wrong, and the fitted rate of false alarms is that of this machine.
"""

import argparse
import importlib.util
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_unlearn.regress import alarms, defence, fingerprint, noise, timing

COMPARISONS = 1000
CORRECT = 1000
FALSE_ALARMS = 0.01
FOUND = 0.95
SLOW_DOWN = 1.10


@dataclass(frozen=True)
class Row:
    """One line of the table; `limit` is a maximum where `at_most`, else a minimum; both are rates."""

    check: str
    limit: float
    measured: float
    at_most: bool = False
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.measured <= self.limit if self.at_most else self.measured >= self.limit


def performance(
    traces: Iterable[noise.Trace], comparisons: int = COMPARISONS, seed: int = 0, **options: Any
) -> Iterator[Row]:
    """Yield two rows for each trace; `options` go to `timing.decide`."""
    for trace in traces:
        starts = random.Random(seed)

        def pairs(
            factor: float, trace: noise.Trace = trace, starts: random.Random = starts
        ) -> Iterator[tuple[float, float]]:
            return noise.Replay(trace, starts.randrange(len(trace.readings))).pairs(factor)

        yield from _rates(f"{trace.name}, noise {trace.variation:.0%}", pairs, comparisons, **options)


def real(seconds: float, size: int = 160, seed: int = 0) -> Iterator[Row]:
    """Yield the same two rows on the real clock, within `seconds`: a GEMM of `size`, and one with 10 % more rows."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(size * 10, size, generator=generator) for _ in range(2))
    work = {1.0: a, SLOW_DOWN: torch.cat([a, b[:size]])}
    right = torch.randn(size, size, generator=generator)

    def pairs(factor: float) -> Iterator[tuple[float, float]]:
        contenders = {"base": lambda: a @ right, "head": lambda: work[factor] @ right}
        return ((row["base"], row["head"]) for row in timing.take_turns(contenders, warm_up=0.02))

    yield from _rates("real clock", pairs, COMPARISONS, seconds=seconds)


def _rates(
    name: str, pairs: Callable[[float], Iterator], comparisons: int, seconds: float = float("inf"), **options: Any
) -> Iterator[Row]:
    for factor in (1.0, SLOW_DOWN):
        end, hits, rounds, done = time.perf_counter() + seconds / 2, 0, 0, 0
        while done < comparisons and time.perf_counter() < end:
            found = timing.decide(pairs(factor), **options)
            hits += found.verdict != "same" if factor == 1.0 else found.verdict == "slower"
            rounds += found.rounds
            done += 1
        note = f"{done} comparisons, {rounds / done:.0f} rounds each"
        if factor == 1.0:
            yield Row(f"{name}: false alarms", FALSE_ALARMS, hits / done, at_most=True, note=note)
        else:
            yield Row(f"{name}: {factor - 1:.0%} slower, found", FOUND, hits / done, note=note)


def defences() -> Iterator[Row]:
    """Yield rows on whether `defence` flags every adversary for what it does, and the honest kernel for nothing."""
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for name, kind, findings in defence.prove(device):
            if kind:
                flagged = any(finding.kind == kind for finding in findings)
                yield Row(f"{kind} ({name}, {device}): flagged", 1.0, float(flagged))
            else:
                note = "; ".join(map(str, findings))
                yield Row(f"nothing ({name}, {device}): flagged", 0.0, float(bool(findings)), at_most=True, note=note)


def numbers() -> Iterator[Row]:
    """Yield rows on the seeded numeric bugs, if installed, and on the criterion's false alarms on this machine."""
    if importlib.util.find_spec("moe_unlearn.regress.seeded"):
        from moe_unlearn.regress import seeded

        yield from seeded.rows(Row)
    found = alarms.measure(CORRECT)
    note = f"{fingerprint.cpu()}: {found}"
    yield Row("correct results: largest error / bound", alarms.LARGEST, found.largest, at_most=True, note=note)
    yield Row("correct results: false alarms, fitted", alarms.LIMIT, found.rate, at_most=True)


def table(rows: Iterable[Row]) -> Iterator[str]:
    """Yield check, limit, measured value and verdict, line by line as the rows come."""
    yield f"{'check':60} {'limit':>9} {'measured':>9}  verdict"
    for row in rows:
        small = 0 < row.limit < 1e-3
        limit = f"{'<=' if row.at_most else '>='} {f'{row.limit:.0e}' if small else f'{row.limit:.0%}'}"
        measured = f"{row.measured:.0e}" if small else f"{row.measured:.1%}"
        verdict = ("ok" if row.passed else "FAILED") + (f"  ({row.note})" if row.note else "")
        yield f"{row.check:60} {limit:>9} {measured:>9}  {verdict}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 0 if every limit is met, else 1."""
    parser = argparse.ArgumentParser(prog="selftest", description=__doc__.split("\n")[0])
    parser.add_argument("--real", action="store_true", help="time a real kernel on the real clock; minutes")
    parser.add_argument("--seconds", type=float, default=300.0, help="of the real clock (default: %(default)g)")
    parser.add_argument("--comparisons", type=int, default=COMPARISONS, help="a trace (default: %(default)s)")
    options = parser.parse_args(arguments)
    failed: list[str] = []

    def rows() -> Iterator[Row]:
        parts = [real(options.seconds)] if options.real else [performance(noise.load(), options.comparisons)]
        for part in (*parts, defences(), numbers()):
            for row in part:
                if not row.passed:
                    failed.append(row.check)
                yield row

    for line in table(rows()):
        print(line, flush=True)
    print(f"failed: {', '.join(failed)}" if failed else "every limit is met")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
