"""The cost of one registered operation, as functions of its arguments by the names of its schema."""

from collections.abc import Callable
from typing import NamedTuple


class Cost(NamedTuple):
    """Functions that take an operation's arguments as keywords, and ignore those that do not matter.

    flops: the floating-point operations of its matrix products.
    workspace: the most bytes that its kernel holds at a time of memory allocated inside, from the kernel's own block
        sizes. Only what goes through torch's allocator counts: the C++ kernels keep some scratch per thread, of the
        size of a processor cache, outside of it.
    part: the name in `backend` whose chosen implementation `workspace` gets as `impl`; "" where there is one alone.
    product: the floating-point operations of one of its matrix products, where all are of one size.
    """

    flops: Callable[..., float]
    workspace: Callable[..., float] | None = None
    part: str = ""
    product: Callable[..., float] | None = None
