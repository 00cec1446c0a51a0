"""The unlearning step: batches in, updated weights and metrics out.

`unlearn` is the step; `objectives` computes its losses, `sinks` take the gradients of the experts where they are made,
`gradients` turns them into one, `tally` weighs its micro-batches.
"""

from moe_unlearn.errors import NonFiniteError, NotPreparedError, RetainBudgetError
from moe_unlearn.step.unlearn import UnlearnStep

__all__ = ["NonFiniteError", "NotPreparedError", "RetainBudgetError", "UnlearnStep"]
