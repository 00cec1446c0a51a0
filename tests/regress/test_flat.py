"""Ops called with the fields of their objects: the same call on today's ops, and on those of an earlier tree."""

import pytest
import torch

from moe_unlearn import ops
from moe_unlearn.ops.expert_wgrad import Factors, expert_wgrad_sgd_
from moe_unlearn.regress.flat import by_keyword

pytestmark = pytest.mark.quick


def test_fields_become_objects_and_other_arguments_stay():
    weight, other = torch.ones(1, 2, 3), torch.ones(1, 2, 3)
    factors = {"grad": torch.randn(4, 2), "input": torch.randn(4, 3), "expert_offsets": torch.tensor([0, 4]).int()}
    update = by_keyword(expert_wgrad_sgd_)
    update(weight, None, **factors, lr=0.1, weight_decay=0.2, step=2, seed=3, impl="ref")
    rule = ops.SGD(lr=0.1, weight_decay=0.2)
    expert_wgrad_sgd_(other, None, Factors(**factors), rule, ops.Update(step=2, seed=3), impl="ref")
    assert torch.equal(weight, other) and not torch.equal(weight, torch.ones(1, 2, 3))


def test_the_head_and_the_reference_of_a_loss():
    h, head, labels = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 4, -100, 2])
    known = {"ref_hidden_states": torch.randn(4, 3), "ref_lm_head": torch.randn(5, 3)}
    got = by_keyword(ops.token_loss)(h, lm_head=head, labels=labels, logit_scale=2.0, kind="kl", **known)
    reference = ops.Reference(*known.values())
    expected = ops.token_loss(h, ops.Head(head, logit_scale=2.0), labels, kind="kl", reference=reference)
    assert torch.equal(got, expected) and got.any()


def test_an_op_without_objects_takes_the_fields_themselves():
    def masked_sgd_(param, *, lr, step, impl="auto"):
        return param, lr, step, impl

    assert by_keyword(masked_sgd_)(1, lr=0.1, step=2, impl="ref") == (1, 0.1, 2, "ref")
