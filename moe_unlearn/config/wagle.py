"""The settings of lever 2, WAGLE, in a recipe."""

from dataclasses import dataclass

from moe_unlearn.config.values import above, between, bytes_of


@dataclass(frozen=True, kw_only=True)
class Wagle:
    """Settings of lever 2, WAGLE; see `moe_unlearn.wagle`.

    It keeps the fraction `keep` of all weights trainable. `mask` is the file of a saved mask, also of one from the
    official code, which is then read instead of computed. `accumulation` goes with `official`: it is the number of
    micro-batches in a step of the official code, by which that code divides its gradients. `memory` changes no bit.
    """

    keep: float = 0.8  # fraction of all weights that may move
    gamma: float = 1.0  # the Hessian's scale in the score
    official: bool = False  # whether masks are those of the released code
    accumulation: int = 1  # with official: micro-batches of a step there, which divide gradients
    mask: str | None = None  # a saved mask, which is read in place of computing one
    memory: str | float | None = None  # bytes, or such as 32GiB, for gradients of scores; null: most of what is free

    def __post_init__(self) -> None:
        between("wagle.keep", self.keep, 0, 1)
        above("wagle.gamma", self.gamma, 0)
        above("wagle.accumulation", self.accumulation, 0)
        bytes_of("wagle.memory", 0 if self.memory is None else self.memory)
        if self.accumulation != 1 and not self.official:
            raise ValueError(f"wagle.accumulation goes with wagle.official; got {self.accumulation} without it")
