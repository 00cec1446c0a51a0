"""What stops a step: the errors that a caller may want to tell apart."""


class NonFiniteError(FloatingPointError):
    """A loss or gradient is NaN or infinite; `updated` names the weights that had been updated before."""

    def __init__(self, message: str, updated: tuple[str, ...] = ()):
        super().__init__(message)
        self.updated = updated


class NotPreparedError(RuntimeError):
    """The recipe needs something that prepare() computes and has not computed."""


class RetainBudgetError(ArithmeticError):
    """The retain loss is above the recipe's budget; raised before the update, so no weight has changed."""
