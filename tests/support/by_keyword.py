"""The layer's and the loss's ops with the fields of their objects as arguments, as tables of cases hold them."""

import functools

from moe_unlearn import ops
from moe_unlearn.regress.flat import by_keyword


def _loss(op):
    @functools.wraps(op)
    def call(hidden_states, lm_head, labels, **options):
        return by_keyword(op)(hidden_states, lm_head=lm_head, labels=labels, **options)

    return call


expert_mlp, expert_mlp_ref = by_keyword(ops.expert_mlp), by_keyword(ops.expert_mlp_ref)
token_loss, token_loss_ref = _loss(ops.token_loss), _loss(ops.token_loss_ref)
