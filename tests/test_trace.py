"""TRACE's statistics, selection and calibration against loops over tokens."""

import json
import logging
import math

import pytest
import torch

from moe_unlearn import trace
from moe_unlearn.model.batches import target_mask
from moe_unlearn.model.capture import collect_routing
from moe_unlearn.ops import route
from moe_unlearn.testing import routing
from tests.support.batches import random_batch, random_batches
from tests.support.models import tiny_deepseek_v3, tiny_olmoe

pytestmark = pytest.mark.quick
VOCAB = 64
FLOAT32 = torch.finfo(torch.float32).eps
EXACT = 1e-7  # what is promised of a reachable target


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_olmoe(vocab_size=VOCAB)


def test_frequencies_count_positions_that_carry_a_loss(model):
    batches = random_batches(VOCAB, 3)
    found = trace.routing_frequencies(model, iter(batches))
    counts, tokens = torch.zeros(2, 8, dtype=torch.int64), 0
    for batch in batches:
        index = collect_routing(model, batch).view(2, *batch["labels"].shape, 2)
        for b in range(len(batch["labels"])):
            for t in range(batch["labels"].shape[1] - 1):
                if batch["attention_mask"][b, t] == 1 and batch["labels"][b, t + 1] != -100:
                    tokens += 1
                    for layer in range(2):
                        counts[layer, index[layer, b, t]] += 1
    assert torch.equal(found.counts, counts) and found.counts.dtype == torch.int64
    assert found.tokens == tokens
    assert found.frequency.sum(1).tolist() == pytest.approx([2, 2])
    assert found.layers == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


def test_shared_experts_and_dense_layers_do_not_count():
    found = trace.routing_frequencies(tiny_deepseek_v3(VOCAB), random_batches(VOCAB, 1))
    assert found.counts.shape == (2, 8) and found.layers[0].startswith("model.layers.1.")
    assert found.frequency.sum(1).tolist() == pytest.approx([2, 2])


def test_the_model_is_left_as_it_was(model):
    model.train()
    trace.routing_frequencies(model, random_batches(VOCAB, 1))
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_padding_content_does_not_matter(model):
    batch = random_batch(VOCAB)
    other = dict(batch, input_ids=torch.where(batch["attention_mask"] == 0, 7, batch["input_ids"]))
    results = [trace.routing_frequencies(model, [b]).counts for b in (batch, other)]
    assert torch.equal(*results)


def test_nothing_counted_is_an_error(model):
    ignored = dict(random_batch(VOCAB))
    ignored["labels"] = torch.full_like(ignored["labels"], -100)
    for batches in ([ignored], []):
        with pytest.raises(ValueError, match="no position carries a loss"):
            trace.routing_frequencies(model, batches)
    with pytest.raises(ValueError, match="no Mixture-of-Experts layers"):
        trace.routing_frequencies(torch.nn.Linear(2, 2), [ignored])


def test_frequencies_survive_a_dictionary_and_json(model):
    found = trace.routing_frequencies(model, random_batches(VOCAB, 1))
    for state in (found.to_dict(), json.loads(json.dumps(found.to_dict(), default=lambda t: t.tolist()))):
        again = trace.RoutingFrequencies.from_dict(state)
        assert torch.equal(again.counts, found.counts) and again.counts.dtype == torch.int64
        assert (again.tokens, again.layers) == (found.tokens, found.layers)


F = torch.tensor([[0.9, 0.5, 0.4, 0.2], [0.5, 0.5, 0.5, 0.5]])
R = torch.tensor([[0.3, 0.1, 0.5, 1.1], [0.5, 0.5, 0.5, 0.5]])


@pytest.mark.parametrize(
    "settings,expected",
    [
        (dict(per_layer=2), [[0, 0], [0, 1]]),  # both ratios 3 and 5; the rest below 1.5
        (dict(per_layer=1), [[0, 0]]),  # gaps 0.6 and 0.4: the gap ranks, not the ratio
        (dict(per_layer=2, min_ratio=4), [[0, 1]]),
        (dict(per_layer=2, min_load=1.5), [[0, 0]]),  # uniform load is 2 / 4
        (dict(per_layer=9, min_ratio=0, min_load=0), [[i, j] for i in range(2) for j in range(4)]),
        (dict(per_layer=1, min_ratio=1.0), [[0, 0], [1, 0]]),  # equal gaps: the lower id
    ],
)
def test_selection(settings, expected):
    selected = trace.select_experts(F, R, **settings)
    assert selected.dtype == torch.bool and selected.nonzero().tolist() == expected


def test_selection_reads_frequencies_as_tables():
    made = [trace.RoutingFrequencies((100 * t).round().long(), 100, ["a", "b"]) for t in (F, R)]
    assert torch.equal(trace.select_experts(*made, per_layer=2), trace.select_experts(F, R, per_layer=2))


def test_an_empty_selection_names_the_highest_ratio(caplog):
    with pytest.raises(ValueError, match=r"highest ratio .* is 5\.000 \(layer 0, expert 1\), min_ratio is 6"):
        trace.select_experts(F, R, per_layer=2, min_ratio=6)
    with pytest.raises(ValueError, match="none has 3 times the uniform load"):
        trace.select_experts(F, R, per_layer=2, min_load=3)
    # an expert of little load does not count, whatever its ratio
    with pytest.raises(ValueError, match=r"is 3\.000 \(layer 0, expert 0\)"):
        trace.select_experts(F, R, per_layer=2, min_ratio=6, min_load=1.5)
    with caplog.at_level(logging.WARNING):
        selected = trace.select_experts(F, R, per_layer=2, min_ratio=6, allow_empty=True)
    assert not selected.any() and "TRACE inactive" in caplog.text and "is 5.000" in caplog.text
    with pytest.raises(ValueError, match="Remedies: a lower min_ratio or min_load, or allow_empty, with which"):
        trace.select_experts(F, R, per_layer=2, min_ratio=6)


def test_an_expert_retain_never_uses_may_be_selected():
    f, r = torch.tensor([[0.6, 0.4, 0.0]]), torch.tensor([[0.0, 0.5, 0.5]])
    assert trace.select_experts(f, r, per_layer=3).tolist() == [[True, False, False]]
    # never used by either side: 0 / 0 is no ratio
    assert not trace.select_experts(f[:, [1, 2]], r[:, [1, 0]], per_layer=2, allow_empty=True, min_load=0).any()


def test_bad_selections_are_named():
    with pytest.raises(ValueError, match="per_layer must be at least 1; got 0"):
        trace.select_experts(F, R, per_layer=0)
    with pytest.raises(ValueError, match=r"one shape; got \[2, 4\] and \[1, 4\]"):
        trace.select_experts(F, R[:1], per_layer=1)


def test_calibration_target():
    assert torch.allclose(trace.calibration_target(F, R, 0.25), 0.75 * R.double() + 0.25 * F.double())
    with pytest.raises(ValueError, match=r"eta must be in \[0, 1\]; got 2"):
        trace.calibration_target(F, R, 2)


def frequency(index, num_experts, weights=None):
    """Weighted frequencies [L, E] of hits; an id twice in a row counts twice."""
    num_layers, tokens, _ = index.shape
    weights = torch.ones(tokens).double() if weights is None else weights.double()
    out = torch.zeros(num_layers, num_experts, dtype=torch.float64)
    for layer in range(num_layers):
        for expert in range(num_experts):
            out[layer, expert] = (weights * (index[layer] == expert).sum(-1)).sum() / weights.sum()
    return out


def case(num_tokens=400, repeated=False):
    """Routing, selection and targets; `repeated` lets a third of the rows name one expert twice."""
    index = torch.stack([routing("skewed", num_tokens, 6, 2, seed=s) for s in range(3)])
    if repeated:
        index[:, ::3, 1] = index[:, ::3, 0]
    base = frequency(index, 6)
    selected = torch.zeros(3, 6, dtype=torch.bool)
    selected[0, 4] = selected[1, 5] = selected[1, 2] = selected[2, 3] = True
    return index, selected, torch.where(selected, 1.5 * base, base)


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_weights_move_the_selected_frequencies_to_their_targets(cap, repeated):
    index, selected, target = case(repeated=repeated)
    found = trace.retain_weights(index, selected, target, cap=cap)
    assert found.weights.dtype == torch.float32
    assert float(abs(found.weights.double().mean() - 1)) <= 4 * FLOAT32
    moved = frequency(index, 6, found.weights)
    assert float((found.achieved - target)[selected].abs().max()) <= EXACT
    assert float((moved - target)[selected].abs().max()) <= 4 * FLOAT32
    assert not found.tilt[~selected].any() and not found.achieved[~selected].any()
    assert cap is None or float(found.weights.max()) <= cap * (1 + FLOAT32)
    w = found.weights.double()
    assert found.ess == pytest.approx(float(w.sum() ** 2 / w.square().sum()))
    assert found.log_weight_max == pytest.approx(math.log(float(w.max())))


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("cap", [None, 1.2])
def test_the_tilt_gives_the_weights_again_on_line(cap, repeated):
    """What `route` adds up over the layers of a forward pass, and the rule, are the offline weights."""
    index, selected, target = case(repeated=repeated)
    found = trace.retain_weights(index, selected, target, cap=cap)
    log_weight = torch.zeros(index.shape[1])
    for layer in range(3):
        route(index[layer], 6, log_tilt=found.tilt[layer].float(), log_weight=log_weight)
    again = trace.online_weights(log_weight, found.bias, cap)
    # float32 sums of at most 6 tilts
    slack = 16 * FLOAT32 * (1 + float(found.tilt.abs().sum()))
    assert float((again / found.weights - 1).abs().max()) <= slack
    assert again.dtype == torch.float32


def test_online_weights_are_capped_by_what_the_preparation_saw():
    found = trace.retain_weights(*case())
    tokens = torch.tensor([0.0, 80.0])
    assert trace.online_weights(tokens, found.bias, math.exp(found.log_weight_max))[1] <= 1.0001 * found.weights.max()
    assert trace.online_weights(tokens, 0.0, None)[0] == 1


def test_repeated_ids_and_sentinels():
    index = torch.tensor([[[0, 0], [1, 6], [6, 6], [2, 0]]])
    selected = torch.tensor([[True, False, False]])
    found = trace.retain_weights(index, selected, torch.full((1, 3), 1.0))
    twice, none, nowhere, once = found.weights.tolist()
    assert (
        none == nowhere and twice + once + 2 * none == pytest.approx(4) and (2 * twice + once) / 4 == pytest.approx(1)
    )
    assert twice / none == pytest.approx((once / none) ** 2)


def test_an_unreachable_target_says_where_it_ended():
    index = torch.tensor([[[0], [0], [1], [1]]])
    selected = torch.tensor([[True, False, True]])  # expert 2 is never used
    found = trace.retain_weights(index, selected, torch.tensor([[0.7, 0.0, 0.4]]))
    assert found.achieved.tolist()[0] == pytest.approx([0.7, 0.0, 0.0], abs=EXACT)
    assert found.tilt[0, 2] == 0


def test_nothing_selected_weighs_one():
    index, selected, target = case(50)
    found = trace.retain_weights(index, torch.zeros_like(selected), target)
    assert found.weights.tolist() == [1.0] * 50 and found.ess == 50 and found.bias == 0


def test_the_whole_procedure_on_a_model(model):
    """Frequencies of the weighted retain tokens, counted again, equal the targets (fidelity test of TRACE)."""
    forget, retain = random_batches(VOCAB, 3, seed=1), random_batches(VOCAB, 3, seed=2)
    f, r = (trace.routing_frequencies(model, batches) for batches in (forget, retain))
    selected = trace.select_experts(f, r, per_layer=2, min_ratio=1.01)
    target = trace.calibration_target(f, r, 0.5)
    index = torch.cat([collect_routing(model, b)[:, target_mask(b).flatten()] for b in retain], 1)
    assert torch.allclose(frequency(index, 8), r.frequency)
    found = trace.retain_weights(index, selected, target)
    moved = frequency(index, 8, found.weights)
    assert float((moved - target)[selected].abs().max()) <= 4 * FLOAT32
    assert float((r.frequency - target)[selected].abs().min()) > 1e3 * FLOAT32


@pytest.mark.parametrize(
    "change,error,message",
    [
        (dict(top_k_index=torch.zeros(3, 4, 2)), TypeError, "must be an integer tensor; got torch.float32"),
        (dict(top_k_index=torch.zeros(3, 0, 2).long()), ValueError, r"T >= 1; got \[3, 0, 2\]"),
        (dict(top_k_index=torch.zeros(4, 2).long()), ValueError, r"must be \[L, T, K\]"),
        (dict(selected=torch.zeros(2, 6).bool()), ValueError, r"\[L, E\] with L = 3"),
        (dict(selected=torch.zeros(3, 6)), ValueError, "selected must be bool"),
        (dict(target=torch.zeros(3, 5)), ValueError, r"target must be \[L, E\] = \[3, 6\]; got \[3, 5\]"),
        (dict(cap=0.5), ValueError, "cap must be at least 1"),
    ],
)
def test_bad_input_is_named(change, error, message):
    index, selected, target = case(10)
    arguments = {"top_k_index": index, "selected": selected, "target": target, **change}
    with pytest.raises(error, match=message):
        trace.retain_weights(**arguments)
