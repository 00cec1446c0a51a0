"""The retain loss as a constraint: its multiplier is a dual variable that follows the loss (PDU).

    minimise  L_forget   subject to   L_retain <= eps
    step      gamma L_forget + lambda (L_retain - eps),  lambda held fixed in it
    after it  lambda <- max(0, lambda + step_size (L_retain - eps)),  lambda_0 = retain.alpha

L_retain is the retain loss of the step, over all its micro-batches and ranks, as lambda multiplied it: with the
load-balancing loss where that is added. The step has read it for its checks already, so there is no further wait for
the device. While the loss is below eps, lambda falls, down to 0; while it is above, lambda rises. A retain loss above
eps before the first update gives a warning. The first `warmup_steps` steps leave lambda alone, and so does a step that
makes no update. lambda is part of the step's state.

Source: arXiv 2506.05314 and its authors' trainer PDU in open-unlearning, where lambda moves at each micro-batch and is
retain.alpha again after a resume; the rest is our specification.
"""

import warnings
from collections.abc import Mapping

from moe_unlearn.config import Dual


class Multiplier:
    """The multiplier of the retain loss: `alpha`, or with `settings` the dual variable that starts there."""

    def __init__(self, settings: Dual | None, alpha: float):
        self.settings = settings
        self.value = alpha
        #: whether steps leave the value alone, for a caller that moves it at other times
        self.held = False
        #: whether to warn of a bound that is too low; a rehearsal, whose losses are not real, switches this off
        self.warns = True

    @property
    def offset(self) -> float:
        """Return lambda eps, which the constraint subtracts from the sum of the losses; it has no gradient."""
        return 0.0 if self.settings is None else self.value * _bound(self.settings)

    def metrics(self) -> dict[str, float]:
        """Return the metric "retain_alpha", the present value; empty if the value is constant."""
        return {} if self.settings is None else {"retain_alpha": self.value}

    def follow(self, losses: Mapping[str, float], router_aux: float, steps: int) -> None:
        """Follow the losses of a step before which `steps` were done; `router_aux` multiplies the loss of that name."""
        if self.settings is None:
            return
        if self.warns and not steps and _excess(self.settings, losses, router_aux) > 0:
            warnings.warn(
                f"the retain loss is {losses['retain_loss']:.4g} before the first update, above what it is to be held "
                f"at (dual.retain_loss_eps {self.settings.retain_loss_eps:g}): choose a bound above it",
                stacklevel=2,
            )
        if not self.held and steps >= self.settings.warmup_steps:
            self.ascend(losses, router_aux)

    def ascend(self, losses: Mapping[str, float], router_aux: float) -> None:
        """Move lambda: lambda <- max(0, lambda + step_size (retain_loss + router_aux router_aux_loss - eps))."""
        assert self.settings is not None
        self.value = max(0.0, self.value + self.settings.step_size * _excess(self.settings, losses, router_aux))


def _excess(settings: Dual, losses: Mapping[str, float], router_aux: float) -> float:
    return losses["retain_loss"] + router_aux * losses.get("router_aux_loss", 0.0) - _bound(settings)


def _bound(settings: Dual) -> float:
    assert settings.retain_loss_eps is not None  # the recipe cannot leave it out
    return settings.retain_loss_eps
