"""The yardstick for an output: a reference computed in the dtype under test, and again with random roundings.

The criterion is that of `testing`. Source: our specification.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_unlearn.testing import rounding

RUNS = 16
YARDSTICKS = ("native", "exact", "sequential")

_yardstick: contextvars.ContextVar[str] = contextvars.ContextVar("yardstick", default="native")


@contextlib.contextmanager
def yardstick(kind: str) -> Iterator[None]:
    """Compute references inside as another library might, named by one of `YARDSTICKS`.

    `native` is PyTorch as it is on this machine; `exact` and `sequential` have the most and the least accurate products
    that a machine may have (`rounding`). A verdict must not depend on the choice.
    """
    if kind not in YARDSTICKS:
        raise ValueError(f"yardstick must be one of {YARDSTICKS}; got {kind!r}")
    token = _yardstick.set(kind)
    try:
        yield
    finally:
        _yardstick.reset(token)


def current_yardstick() -> str:
    """Return the name of the yardstick by which references are computed in the present context."""
    return _yardstick.get()


def applied() -> contextlib.AbstractContextManager:
    """Return a context in which PyTorch computes as the current yardstick does."""
    kind = current_yardstick()
    return contextlib.nullcontext() if kind == "native" else rounding.arithmetic(kind)


@dataclass(frozen=True)
class Baseline:
    """Result of a reference in the dtype under test.

    `value` is the result, `rounded()` returns those of `RUNS` runs with random roundings, [RUNS, ...].
    """

    value: Tensor
    rounded: Callable[[], Tensor]

    def replaced(self, value: Tensor) -> "Baseline":
        """Return the same reference with another value to compare with, such as a recorded one."""
        return replace(self, value=value)


class Reference:
    """A computation in the dtype under test, run at once, and again with random roundings when these are needed.

    `compute()` returns a tensor or an object that holds some, starts from the same state each time and draws its random
    numbers from a seed; `value` is what it returned.
    """

    def __init__(self, compute: Callable[[], Any]):
        self._compute = compute
        with applied():
            self.value = compute()

    @functools.cached_property
    def _runs(self) -> list:
        runs: list = []
        deviations: rounding.Deviations = {}
        for seed in range(RUNS):
            with rounding.arithmetic("random", seed, deviations):
                runs.append(self._compute())
        return runs

    def baseline(self, pick: Callable[[Any], Tensor] = lambda made: made) -> Baseline:
        """Return the `Baseline` of the tensor that `pick` finds in the computed value."""
        return Baseline(pick(self.value), lambda: torch.stack([pick(made).detach() for made in self._runs]))
