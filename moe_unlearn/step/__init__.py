"""The unlearning step: it takes batches, updates the weights and returns metrics.

`unlearn` holds the step itself. `objectives` computes its losses, `sinks` take the gradients of the experts where they
are made, `gradients` combines the gradients into one, `tally` weighs the micro-batches, and `dual` adapts the weight of
the retain loss.
"""

from moe_unlearn.errors import NonFiniteError, NotPreparedError, RetainBudgetError
from moe_unlearn.step.unlearn import UnlearnStep

__all__ = ["NonFiniteError", "NotPreparedError", "RetainBudgetError", "UnlearnStep"]
