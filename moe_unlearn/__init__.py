"""moe-unlearn: unlearning of Mixture-of-Experts language models as one exact step.

Importing the package registers transformers' experts implementation "moe_unlearn". Its names are loaded when they are
asked for.
"""

from typing import TYPE_CHECKING

from moe_unlearn import on_demand

if TYPE_CHECKING:
    from moe_unlearn import losses, mollm, ops, trace, wagle
    from moe_unlearn.audit import audit
    from moe_unlearn.config import Recipe
    from moe_unlearn.experts import enable
    from moe_unlearn.masks import WeightMask
    from moe_unlearn.optim import MaskedAdamW, MaskedSGD
    from moe_unlearn.step import UnlearnStep
    from moe_unlearn.trainer import UnlearnTrainer
else:
    on_demand.install(
        __name__,
        {
            "MaskedAdamW": "optim",
            "MaskedSGD": "optim",
            "Recipe": "config",
            "UnlearnStep": "step",
            "UnlearnTrainer": "trainer",
            "WeightMask": "masks",
            "audit": "audit.run",
            "enable": "experts",
            "losses": "losses",
            "mollm": "mollm",
            "ops": "ops",
            "trace": "trace",
            "wagle": "wagle",
        },
    )

__all__ = [
    "MaskedAdamW",
    "MaskedSGD",
    "Recipe",
    "UnlearnStep",
    "UnlearnTrainer",
    "WeightMask",
    "audit",
    "enable",
    "losses",
    "mollm",
    "ops",
    "trace",
    "wagle",
]
__version__ = "0.1.0"
