"""moe-unlearn: unlearning of Mixture-of-Experts language models as one exact step.

Importing the package registers transformers' experts implementation "moe_unlearn".
"""

from moe_unlearn import losses, mollm, ops, trace, wagle
from moe_unlearn.audit import audit
from moe_unlearn.config import Recipe
from moe_unlearn.experts import enable
from moe_unlearn.masks import WeightMask
from moe_unlearn.optim import MaskedAdamW, MaskedSGD
from moe_unlearn.step import UnlearnStep
from moe_unlearn.trainer import UnlearnTrainer

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
