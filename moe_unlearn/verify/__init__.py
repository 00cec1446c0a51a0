"""Verifying a step: the plain path beside it, and against both in float64.

`verifier` makes the step twice more, `forced_routing` gives these runs the step's own routes, `judge` holds what a step
makes to the criterion of `testing`.
"""

from moe_unlearn.verify.verifier import VerificationError, Verifier

__all__ = ["VerificationError", "Verifier"]
