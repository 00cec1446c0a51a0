"""The section `dual` of a recipe, which bounds the retain loss."""

from dataclasses import dataclass

from moe_unlearn.config.values import above, at_least


@dataclass(frozen=True, kw_only=True)
class Dual:
    """A bound on the retain loss; see `step.dual`.

    `retain_loss_eps` has no default, because it should lie somewhat above the retain loss of the unchanged model.
    `retain.alpha` is the first value of the dual variable, which moves by `step_size` times the excess after each step
    but the first `warmup_steps`.
    """

    retain_loss_eps: float | None = None  # what the retain loss is held at, above that of the model as it is
    step_size: float = 1.0  # what times the excess is added to the factor of the retain loss after a step
    warmup_steps: int = 0  # steps that leave that factor alone

    def __post_init__(self) -> None:
        if self.retain_loss_eps is None:
            raise ValueError(
                "dual.retain_loss_eps must say what the retain loss is held at, somewhat above that of the model as it "
                "is, which the first step reports; got none"
            )
        at_least("dual.retain_loss_eps", self.retain_loss_eps, 0)
        above("dual.step_size", self.step_size, 0)
        at_least("dual.warmup_steps", self.warmup_steps, 0)
