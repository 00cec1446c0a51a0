"""Errors each of its own class, so that callers can tell them apart: what stops a step, and what cannot run here."""

import re
from typing import Any


class NonFiniteError(FloatingPointError):
    """A loss or gradient is NaN or infinite; `updated` names the weights that were updated before."""

    def __init__(self, message: str, updated: tuple[str, ...] = ()):
        super().__init__(message)
        self.updated = updated


class NotPreparedError(RuntimeError):
    """The recipe needs something that prepare() has not computed yet."""


class RetainBudgetError(ArithmeticError):
    """The retain loss is above the recipe's budget; raised before the update, so no weight has changed."""


class RankError(RuntimeError):
    """Ends a rank because another one failed."""


class MissingLibraryError(ImportError):
    """Error for a library that is needed but not installed; the message names it and its extra."""


class VerificationError(ArithmeticError):
    """The fused step differs from the plain one; the model and the optimizer are as before the step."""

    def __init__(self, report: Any, undone: str):
        super().__init__(f"{report}\n{undone}")
        self.report = report  # a `verify.judge.Report`


class Unfit(RuntimeError):
    """A kernel's refusal of its operands; the message says what they lack."""


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
