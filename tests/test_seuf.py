"""SEUF's affinity, choice and anchor loss against sums written out token by token."""

import pytest
import torch

from moe_unlearn import seuf
from moe_unlearn.experts import experts_modules
from tests.support.batches import random_batches
from tests.support.models import tiny_olmoe

pytestmark = pytest.mark.quick
VOCAB = 64


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_olmoe(vocab_size=VOCAB).eval()


def test_an_id_behind_the_last_expert_has_no_gate():
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.125]], requires_grad=True)
    gate = seuf.Gate(torch.tensor([[2, 0], [1, 3]]), weights, num_experts=3).dense()
    assert gate.tolist() == [[0.25, 0, 0.75], [0, 0.5, 0]]
    (gradient,) = torch.autograd.grad(gate.sum(), weights)
    assert gradient.tolist() == [[1, 1], [1, 0]]


def test_affinity_is_the_mean_over_sequences_of_the_mean_over_their_tokens(model):
    """Of sequences of different lengths, the shorter of which count as much as the longer."""
    batches = random_batches(VOCAB, count=2)
    found = seuf.affinity(model, batches)
    expected, sequences = torch.zeros_like(found), 0
    for batch in batches:
        lengths = batch["attention_mask"].sum(1)
        assert len(set(lengths.tolist())) > 1
        for i, length in enumerate(lengths.tolist()):
            row = {key: value[i : i + 1, :length] for key, value in batch.items()}
            with torch.no_grad(), seuf.gates(model) as gates:
                model(row["input_ids"], attention_mask=row["attention_mask"], use_cache=False)
            expected += torch.stack([gate.dense().double().mean(0) for gate in gates.values()])
            sequences += 1
    assert found.dtype == torch.float64 and len(found) == len(experts_modules(model))
    torch.testing.assert_close(found, expected / sequences, rtol=1e-5, atol=1e-7)


def test_one_expert_of_the_whole_model_is_chosen_the_first_of_equals():
    score = torch.tensor([[0.1, 0.5, 0.2], [0.5, 0.3, 0.4]])
    assert seuf.select(score).nonzero().tolist() == [[0, 1]]


def test_the_anchor_is_the_mean_distance_of_attended_gates():
    gate = torch.tensor([[1.0, 0.0], [0.5, 0.5], [9.0, 9.0]])
    assert seuf.anchor_loss(gate, 0, torch.tensor([True, True, False])).item() == (0 + 0.5) / 2
