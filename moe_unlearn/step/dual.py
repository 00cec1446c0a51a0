"""The retain loss as a constraint: what multiplies it is a dual variable, which follows it (PDU).

    minimise  L_forget   subject to   L_retain <= eps
    step      gamma L_forget + lambda (L_retain - eps),  lambda held fixed in it
    after it  lambda <- max(0, lambda + step_size (L_retain - eps)),  lambda_0 = retain.alpha

L_retain is the retain loss of the step, over all its micro-batches and ranks, the load-balancing loss included where it
is added: what lambda multiplied. It was read for the step's checks already, so that the device is not waited for. While
the constraint holds with room lambda falls, down to 0; while it does not, lambda rises. A retain loss that is above eps
before the first update is warned of. The first `warmup_steps` steps leave lambda alone, and so does a step that makes
no update. lambda is part of the step's state.

Source: arXiv 2506.05314 and its authors' trainer PDU in open-unlearning, where lambda moves at each micro-batch and is
retain.alpha again after a resume; the rest is our specification.
"""

import warnings
from collections.abc import Mapping

from moe_unlearn.config import Dual


class Multiplier:
    """What multiplies the retain loss: `alpha`, and with `settings` the dual variable that starts there."""

    def __init__(self, settings: Dual | None, alpha: float):
        self.settings = settings
        self.value = alpha
        #: whether steps leave it alone, for a caller that moves it at other times
        self.held = False
        #: whether a bound that is too low is warned of; the losses of a rehearsal say nothing of it
        self.warns = True

    @property
    def offset(self) -> float:
        """lambda eps, which the constraint takes off the sum of the losses; no gradient is of it."""
        return 0.0 if self.settings is None else self.value * self.settings.retain_loss_eps

    def metrics(self) -> dict[str, float]:
        """{"retain_alpha": what it is}, nothing where it does not change."""
        return {} if self.settings is None else {"retain_alpha": self.value}

    def follow(self, losses: Mapping[str, float], router_aux: float, steps: int) -> None:
        """Take the losses of a step before which `steps` were done; `router_aux` is what multiplies that loss."""
        if self.settings is None:
            return
        if self.warns and not steps and self._excess(losses, router_aux) > 0:
            warnings.warn(
                f"the retain loss is {losses['retain_loss']:.4g} before the first update, above what it is to be held "
                f"at (dual.retain_loss_eps {self.settings.retain_loss_eps:g}): choose a bound above it",
                stacklevel=2,
            )
        if not self.held and steps >= self.settings.warmup_steps:
            self.ascend(losses, router_aux)

    def ascend(self, losses: Mapping[str, float], router_aux: float) -> None:
        """lambda <- max(0, lambda + step_size (retain_loss + router_aux router_aux_loss - eps)), of these losses."""
        self.value = max(0.0, self.value + self.settings.step_size * self._excess(losses, router_aux))

    def _excess(self, losses: Mapping[str, float], router_aux: float) -> float:
        return losses["retain_loss"] + router_aux * losses.get("router_aux_loss", 0.0) - self.settings.retain_loss_eps
