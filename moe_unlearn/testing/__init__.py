"""The accuracy criterion for kernels, and inputs that tests of kernels share.

criterion    decides whether a result is as accurate as the reference's; makes inputs of every layout and routing
yardstick    chooses the arithmetic that the reference is computed with
rounding     computes the reference under other roundings
sums         computes how large the partial sums of an operation get
"""

from moe_unlearn.testing.criterion import (
    LAYOUTS,
    MINIMUM_ROW,
    ROUTINGS,
    SPREAD,
    AccuracyError,
    Margin,
    assert_as_accurate,
    check_against_ref,
    described,
    evaluate,
    in_layout,
    integers,
    margin,
    outcomes,
    poison,
    routing,
)
from moe_unlearn.testing.rounding import ulp

__all__ = [
    "LAYOUTS",
    "MINIMUM_ROW",
    "ROUTINGS",
    "SPREAD",
    "AccuracyError",
    "Margin",
    "assert_as_accurate",
    "check_against_ref",
    "described",
    "evaluate",
    "in_layout",
    "integers",
    "margin",
    "outcomes",
    "poison",
    "routing",
    "ulp",
]
