"""The criterion that kernels are held to, and the inputs that tests of kernels share.

criterion    whether a result is as accurate as the reference's, and inputs of every layout and routing
yardstick    which products the reference is computed with
rounding     the reference under other roundings
sums         how large the partial sums of an operation get
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
    ulp,
)  # fmt: skip

__all__ = [
    "LAYOUTS", "MINIMUM_ROW", "ROUTINGS", "SPREAD", "AccuracyError", "Margin", "assert_as_accurate",
    "check_against_ref", "described", "evaluate", "in_layout", "integers", "margin", "outcomes", "poison", "routing",
    "ulp",
]  # fmt: skip
