"""Settings of a recipe's optimizer."""

from dataclasses import dataclass, field

from moe_unlearn.config.values import above, at_least, at_most, one_of


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Optimizer, `sgd` or `adamw`, always masked; see `moe_unlearn.optim`. `numerics` is "parity" (as in torch),
    "nearest" or "stochastic" (fp32 state, bf16 weights rounded once) or "fp32_master"; None takes
    "stochastic" for bf16 models and for a `state` other than float32, and "parity" otherwise. `state` says in what
    moments are kept: "float32" (8 bytes a weight under AdamW), "bfloat16" (4) or "int8" (blocks of codes, 2.1).
    `offload` keeps them and fp32 masters in the memory of the host; see `moe_unlearn.offload`."""

    name: str = "adamw"  # the optimizer, always masked
    lr: float = 1e-5  # learning rate
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # AdamW's rates of decay of its two moments
    eps: float = 1e-8  # what AdamW adds to its divisor
    momentum: float = 0.0  # SGD's momentum
    weight_decay: float = 0.0  # decay of the weights that may move
    warmup_steps: int = 0  # steps from 0 to lr, linearly; then lr stays
    numerics: str | None = None  # null: stochastic for bf16 or a narrow state, else parity
    state: str = "float32"  # in what the optimizer keeps its moments: float32, bfloat16 or int8
    offload: bool = False  # whether a GPU's moments lie on the host and come for their update; no bit changes
    max_grad_norm: float | None = None  # length to which gradients are clipped; null: not at all

    def __post_init__(self) -> None:
        one_of("optimizer.name", self.name, ("sgd", "adamw"))
        at_least("optimizer.lr", self.lr, 0)
        at_most("optimizer.lr", self.lr, 1e3)  # far beyond what any update survives
        above("optimizer.eps", self.eps, 0)  # without it a weight without a gradient is 0 / 0
        at_least("optimizer.warmup_steps", self.warmup_steps, 0)
        if self.numerics is not None:
            one_of("optimizer.numerics", self.numerics, ("parity", "nearest", "stochastic", "fp32_master"))
        one_of("optimizer.state", self.state, ("float32", "bfloat16", "int8"))
        if self.state != "float32" and self.numerics in ("parity", "nearest"):
            raise ValueError(
                f"optimizer.state {self.state} needs optimizer.numerics stochastic, fp32_master or null; "
                f"got {self.numerics}"
            )
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"optimizer.betas must be two numbers in [0, 1); got {self.betas}")
