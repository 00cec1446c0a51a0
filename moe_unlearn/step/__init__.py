"""The unlearning step: it takes batches, updates the weights and returns metrics.

`unlearn` holds the step itself, and `weights` what it may change. `objectives` computes its losses, `sinks` take the
gradients of the experts where they are made, `gradients` stores all gradients and combines them into one, `factors`
computes with those that are not stored, `tally` weighs the micro-batches, `dual` adapts the weight of the retain loss,
and `checks` stop a step. `sharded` is the step on weights that ranks share out, and `saved` what they save. Others see
a step through its `view()` (`moe_unlearn.view`).
"""

from moe_unlearn.errors import NonFiniteError, NotPreparedError, RetainBudgetError
from moe_unlearn.step.unlearn import UnlearnStep

__all__ = ["NonFiniteError", "NotPreparedError", "RetainBudgetError", "UnlearnStep"]
