"""Says on stderr how far long work is, for a person who waits: a bar on a terminal, a line a minute elsewhere.

    with progress.shown(Form(bars=True)):            the command line does, unless --quiet
        for batch in watched(batches, "evaluation"):
            ...

Without `shown` nothing is said, so that a library's calls are quiet. Under torchrun the first rank alone speaks.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, TypeVar

_Item = TypeVar("_Item")
EVERY = 60.0  # seconds between two lines where there is no terminal


@dataclass(frozen=True)
class Form:
    """Says what is shown: `bars` of long work, a line each `every` steps of training (0: none), as JSON or to read."""

    bars: bool = False
    every: int = 0
    json_lines: bool = False


_form = Form()


def form() -> Form:
    """Return what is shown at present."""
    return _form


@contextlib.contextmanager
def shown(wanted: Form) -> Iterator[None]:
    """Show progress inside as `wanted` says; nothing on ranks of torchrun but the first."""
    global _form
    before, _form = _form, wanted if os.environ.get("RANK", "0") == "0" else Form()
    try:
        yield
    finally:
        _form = before


class Bar:
    """Shows the progress of one piece of work, named `what`, of `total` units: its share, and when it will be done.

    A context manager. A terminal gets a bar, which goes when the work is done; elsewhere there is a line a minute.
    """

    def __init__(self, what: str, total: int, unit: str = "batch"):
        self.what, self.total, self.unit, self.done = what, total, unit, 0
        self._began = self._said = time.monotonic()
        self._bar: Any = None
        if _form.bars and sys.stderr.isatty():
            from tqdm import tqdm  # here, since most processes show no bar

            self._bar = tqdm(total=total, desc=what, unit=unit, leave=False, file=sys.stderr)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, units: int = 1) -> None:
        """Count so many more units as done."""
        self.done += units
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(units)
        elif _form.bars and now - self._said >= EVERY:
            self._said = now
            say(f"{self.what}: {self.done} of {self.total} ({self.unit}), {self._left(now)}")

    def _left(self, now: float) -> str:
        """Return how long the rest will take, if it goes on like what is done."""
        left = (now - self._began) * (self.total - self.done) / self.done if self.done else 0.0
        return f"about {duration(left)} left" if self.done else "just begun"


def watched(items: Iterable[_Item], what: str, unit: str = "batch") -> Iterator[_Item]:
    """Yield the items, of which there are as many as `len` says, and show how many have been dealt with."""
    with Bar(what, len(items) if isinstance(items, Sized) else 0, unit) as bar:
        for item in items:
            yield item
            del item  # it may be large, and the next one is made now
            bar.advance()


def say(line: str) -> None:
    """Print a line to stderr at once, past a bar that may be there, if progress is shown at all."""
    if not _form.bars:
        return
    if sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Return seconds, minutes or hours in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
