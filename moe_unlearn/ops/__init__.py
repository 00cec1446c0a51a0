"""The eight ops; each file holds the formula, the public function, `<op>_ref`, the custom op and its autograd."""

from moe_unlearn.ops.expert_mlp import expert_mlp, expert_mlp_ref
from moe_unlearn.ops.expert_wgrad import expert_wgrad, expert_wgrad_ref
from moe_unlearn.ops.gate import ExpertLayout, ExpertWeights, Gate
from moe_unlearn.ops.gram import gram, gram_factors, gram_ref
from moe_unlearn.ops.legal import check_device
from moe_unlearn.ops.masked_update import (
    SGD,
    AdamW,
    Update,
    masked_adamw_,
    masked_adamw_ref,
    masked_sgd_,
    masked_sgd_ref,
)
from moe_unlearn.ops.retain_weights import RetainWeights, retain_weights, retain_weights_ref
from moe_unlearn.ops.route import Routing, route, route_ref
from moe_unlearn.ops.token_loss import Head, Reference, token_loss, token_loss_ref
from moe_unlearn.ops.weight_score import score_histogram, score_mask, weight_score_ref

__all__ = [
    "SGD",
    "AdamW",
    "ExpertLayout",
    "ExpertWeights",
    "Gate",
    "Head",
    "Reference",
    "RetainWeights",
    "Routing",
    "Update",
    "check_device",
    "expert_mlp",
    "expert_mlp_ref",
    "expert_wgrad",
    "expert_wgrad_ref",
    "gram",
    "gram_factors",
    "gram_ref",
    "masked_adamw_",
    "masked_adamw_ref",
    "masked_sgd_",
    "masked_sgd_ref",
    "retain_weights",
    "retain_weights_ref",
    "route",
    "route_ref",
    "score_histogram",
    "score_mask",
    "token_loss",
    "token_loss_ref",
    "weight_score_ref",
]
