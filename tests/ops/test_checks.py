"""Operands of another kind than an op takes, which may hold as many numbers of other meaning."""

import pytest
import torch

from moe_unlearn import ops
from moe_unlearn.ops.expert_wgrad import Factors, expert_wgrad, expert_wgrad_adamw_, expert_wgrad_sgd_
from tests.ops.expert_mlp.cases import case

pytestmark = pytest.mark.quick
SGD, ADAMW, FIRST = ops.SGD(lr=0.1, momentum=0.9), ops.AdamW(lr=0.1), ops.Update(step=1)
ROWS = Factors(torch.ones(3, 4), torch.ones(3, 5), torch.tensor([0, 1, 3], dtype=torch.int32))


def calls(rule, update=FIRST):
    """Return by name each update with this rule, on fresh zeros."""

    def zeros():
        return [torch.zeros(2, 4, 5) for _ in range(4)]

    p, g, m, v = zeros()
    return {
        "masked sgd": lambda: ops.masked_sgd_(p, g, m, None, rule, update),
        "masked adamw": lambda: ops.masked_adamw_(p, g, m, v, None, rule, update),
        "wgrad sgd": lambda: expert_wgrad_sgd_(p, m, ROWS, rule, update),
        "wgrad adamw": lambda: expert_wgrad_adamw_(p, m, v, ROWS, rule, update),
    }


@pytest.mark.parametrize("name", calls(SGD))
def test_a_rule_of_the_other_kind_is_refused(name):
    """Both rules hold five numbers: momentum and dampening were taken for betas, without a word."""
    right, wrong = (ADAMW, SGD) if "adamw" in name else (SGD, ADAMW)
    calls(right)[name]()
    with pytest.raises(TypeError, match=f"rule must be {type(right).__name__}; got {type(wrong).__name__}"):
        calls(wrong)[name]()
    with pytest.raises(TypeError, match="update must be Update; got int"):
        calls(right, update=1)[name]()


def test_a_layer_and_a_loss_want_their_objects():
    inputs = case()
    routed = [inputs[name] for name in ("hidden_states", "top_k_weights", "sorted_rows", "expert_offsets")]
    weights = inputs["gate_up_proj"], inputs["down_proj"]
    with pytest.raises(TypeError, match="weights must be ExpertWeights; got tuple"):
        ops.expert_mlp(*routed, weights)
    with pytest.raises(TypeError, match="layout must be ExpertLayout; got Gate"):
        ops.expert_mlp(*routed, ops.ExpertWeights(*weights), layout=ops.Gate())
    hidden, head, labels = torch.ones(3, 4), torch.ones(7, 4), torch.tensor([1, 2, 3])
    with pytest.raises(TypeError, match="head must be Head; got Tensor"):
        ops.token_loss(hidden, head, labels)
    with pytest.raises(TypeError, match="reference must be Reference; got Tensor"):
        ops.token_loss(hidden, ops.Head(head), labels, kind="kl", reference=hidden)


@pytest.mark.parametrize("ids", [[0, 0], [0, 1, 0], [1, 0, 1]])
def test_what_is_updated_is_listed_once(ids):
    """Two entries of one expert raced for its weight. A gradient alone may be computed twice."""
    listed, m = torch.tensor(ids), torch.zeros(len(ids), 4, 5)
    before = torch.zeros(2, 4, 5)
    p, told = before.clone(), rf"must be distinct; got \[{max(ids, key=ids.count)}\] more than once"
    with pytest.raises(ValueError, match=f"slices {told}"):
        ops.masked_sgd_(p, torch.ones_like(m), m, None, SGD, FIRST, slices=listed)
    with pytest.raises(ValueError, match=f"experts {told}"):
        expert_wgrad_sgd_(p, m, ROWS, SGD, FIRST, experts=listed)
    with pytest.raises(ValueError, match=f"experts {told}"):
        expert_wgrad_adamw_(p, m, m.clone(), ROWS, ADAMW, FIRST, experts=listed)
    assert torch.equal(p, before) and not m.any()
    assert expert_wgrad(**ROWS._asdict(), experts=listed).shape == m.shape
    inputs = case()
    routed = [inputs[name] for name in ("hidden_states", "top_k_weights", "sorted_rows", "expert_offsets")]
    weights = ops.ExpertWeights(inputs["gate_up_proj"], inputs["down_proj"])
    with pytest.raises(ValueError, match=f"trained_experts {told}"):
        ops.expert_mlp(*routed, weights, trained_experts=listed.int())


def test_indices_need_no_order():
    p, m = torch.zeros(2, 4, 5), torch.zeros(2, 4, 5)
    grad = torch.arange(2.0).view(2, 1, 1).expand(2, 4, 5)
    ops.masked_sgd_(p, grad, m, None, SGD, FIRST, slices=torch.tensor([1, 0]))
    assert p[0].any() and not p[1].any()
