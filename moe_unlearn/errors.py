"""Errors each of its own class, so that callers can tell them apart: what stops a step, and what cannot run here."""

import re


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


def reason_of(error: Exception) -> str:
    """Return the first line of what an error of a library says, or its class.

    Of torch's refusal of a pickle it is what that would run, without the advice to run it.
    """
    text = str(error).strip()
    if text.startswith("Weights only load failed"):
        named = re.search(r"GLOBAL ([\w.]+)", text)
        return f"a pickle that holds more than tensors{f', such as {named[1]}' if named else ''}, which is never run"
    return text.partition("\n")[0] or type(error).__name__
