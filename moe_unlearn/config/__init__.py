"""Recipes, which describe unlearning runs by typed values that are checked when they are made."""

from moe_unlearn.config.adapter import Adapter
from moe_unlearn.config.dual import Dual
from moe_unlearn.config.files import geometry, models, shipped
from moe_unlearn.config.optimizer import Optimizer
from moe_unlearn.config.recipe import (
    COMPARE_COMPANIONS,
    FORGET_OBJECTIVES,
    NEED_REFUSALS,
    NEED_UNSEEN,
    REFERENCES,
    RETAIN_OBJECTIVES,
    SCOPES,
    SEAMS,
    Data,
    Forget,
    Mollm,
    Recipe,
    Retain,
    Scope,
    Trace,
)
from moe_unlearn.config.router import Router
from moe_unlearn.config.wagle import Wagle

__all__ = [
    "Adapter",
    "COMPARE_COMPANIONS",
    "Data",
    "Dual",
    "FORGET_OBJECTIVES",
    "Forget",
    "Mollm",
    "NEED_REFUSALS",
    "NEED_UNSEEN",
    "Optimizer",
    "REFERENCES",
    "RETAIN_OBJECTIVES",
    "Recipe",
    "Retain",
    "Router",
    "SCOPES",
    "SEAMS",
    "Scope",
    "Trace",
    "Wagle",
    "geometry",
    "models",
    "shipped",
]
