"""The exponential and the quotient of a GPU, for Triton's interpreter: approximate instructions, off by a last bit.

    exp(x)    ex2.approx of x log2(e), which is rounded before: on large |x| that costs more than the instruction
    a / b     a times rcp.approx of b, rounded again

Both instructions may be one unit in the last place off the nearest float. How far off, and to which side, is a hash of
their operand: like the hardware, the same for the same operand, and like nothing in particular otherwise.
"""

import contextlib

import numpy as np
import pytest

LOG2_E = np.float32(1.4426950408889634)


@contextlib.contextmanager
def approximate(seed: int = 0):
    """Inside, float32 kernels in the interpreter have a GPU's exponentials and quotients; others are left alone."""
    from triton.runtime.interpreter import InterpreterBuilder

    def exp(x):
        return _off(np.exp2(_double(x * LOG2_E)), seed) if x.dtype == np.float32 else np.exp(x)

    def divide(a, b):
        if b.dtype != np.float32:
            return np.divide(a, b)
        quotient = a * _off(1 / _double(b), seed + 1)
        plain = np.divide(a, b)
        # the instruction scales what would leave the range on the way
        return np.where(np.isfinite(plain) & np.isfinite(quotient), quotient, plain)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_exp", lambda self, arg: self.unary_op(arg, exp))
        patch.setattr(InterpreterBuilder, "create_fdiv", lambda self, a, b: self.binary_op(a, b, divide))
        yield


def _double(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, dtype=np.float64)


def _off(exact: np.ndarray, seed: int) -> np.ndarray:
    """The nearest float32 to `exact`, a unit in its last place below or above it, or itself: a third each."""
    with np.errstate(over="ignore", under="ignore"):
        nearest = exact.astype(np.float32)
    mixed = (exact.view(np.uint64) + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
    side = ((mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(40)) % np.uint64(3)
    target = np.select([side == 0, side == 1], [np.float32(-np.inf), np.float32(np.inf)], nearest)
    moved = np.nextafter(nearest, target.astype(np.float32))
    # 0, 1 and infinity come out as they are: exp(0) is 1
    return np.where(np.isfinite(moved) & (nearest != 0) & (nearest != 1), moved, nearest)
