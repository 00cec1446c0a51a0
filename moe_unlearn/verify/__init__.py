"""Verification of a step, by comparison with the plain path in the model's dtype and in float64.

`verifier` makes the step twice more, `forced_routing` gives these runs the step's own routes, `gathering` puts together
what several ranks have, and `judge` applies the criterion of `testing` to the results of the step.
"""

from moe_unlearn.errors import VerificationError
from moe_unlearn.verify.verifier import Verifier

__all__ = ["VerificationError", "Verifier"]
