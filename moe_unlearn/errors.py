"""Errors each of its own class, so that callers can tell them apart: what stops a step, and what cannot run here."""


class NonFiniteError(FloatingPointError):
    """A loss or gradient is NaN or infinite; `updated` names the weights that were updated before."""

    def __init__(self, message: str, updated: tuple[str, ...] = ()):
        super().__init__(message)
        self.updated = updated


class NotPreparedError(RuntimeError):
    """The recipe needs something that prepare() has not computed yet."""


class RetainBudgetError(ArithmeticError):
    """The retain loss is above the recipe's budget; raised before the update, so no weight has changed."""


class UnavailableError(RuntimeError):
    """A forced implementation of an op is missing here, or its import fails."""
