"""Packing never mixes examples: where it is exact it equals rows of their own, elsewhere it is refused."""

import pytest
import torch

from moe_unlearn.data import Example, check_packing, pack, packed_batches
from moe_unlearn.testing import assert_as_accurate
from tests.support import models

FAMILIES = sorted(set(models.TINY_MODELS) - {"gpt_oss"})


def examples(*lengths):
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 60, (n,), generator=draw).tolist() for n in lengths]
    return [Example(ids, [-100] + ids[1:] if i % 2 else list(ids), 1) for i, ids in enumerate(rows)]


@pytest.mark.quick
def test_rows_hold_every_example_once_and_fill_well():
    lengths = [int(n) for n in torch.randint(1, 65, (200,), generator=torch.Generator().manual_seed(1))]
    rows = pack(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(200))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 64) + 1  # what decreasing fit is known to reach
    assert pack(lengths, 64) == rows
    assert pack([3, 5, 2], 5) == [[1], [0, 2]]
    assert pack([], 5) == []
    for bad in ([6], [1, 0]):
        with pytest.raises(ValueError, match=rf"example {len(bad) - 1}: expected 1 to 5 tokens; got {bad[-1]}"):
            pack(bad, 5)


@pytest.mark.quick
def test_a_packed_batch():
    model = models.TINY_MODELS["olmoe"]()
    rows = examples(4, 3, 2, 5)
    [batch] = packed_batches(rows, 8, model=model, batch_size=2, pad_id=9)
    assert set(batch) == {"input_ids", "labels", "position_ids", "index"}
    assert batch["index"].tolist() == [[3, 3, 3, 3, 3, 1, 1, 1], [0, 0, 0, 0, 2, 2, -1, -1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1, 0, 1]]
    for i, example in enumerate(rows):
        mine = batch["index"] == i
        assert batch["input_ids"][mine].tolist() == example.input_ids
        assert batch["labels"][mine].tolist() == [-100, *example.labels[1:]]
    assert (batch["input_ids"][batch["index"] < 0] == 9).all()
    assert (batch["labels"][batch["index"] < 0] == -100).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_logits_equal_those_of_rows_of_their_own(family, attention):
    model = models.TINY_MODELS[family](**({"sliding_window": 4} if family == "mixtral" else {})).eval()
    model.set_attn_implementation(attention)
    rows = examples(9, 5, 6, 3, 1)

    @torch.no_grad()
    def alone():
        return torch.cat([model(input_ids=torch.tensor([e.input_ids]), use_cache=False).logits[0] for e in rows])

    baseline = alone()
    model.double()  # so that rounding hides nothing: a mixed-in example would be seen at float32's accuracy
    packed = [torch.empty(0)] * len(rows)
    with torch.no_grad():
        for batch in packed_batches(rows, 14, model=model, batch_size=2):
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            for i in set(batch["index"].flatten().tolist()) - {-1}:
                packed[i] = logits[batch["index"] == i]
    assert_as_accurate(torch.cat(packed).float(), baseline, alone())


def test_models_that_would_mix_are_refused():
    # its masks are made without position_ids
    with pytest.raises(ValueError, match="GptOssForCausalLM with eager attention mixes packed examples.*use padding"):
        packed_batches(examples(3, 4), 8, model=models.TINY_MODELS["gpt_oss"]())


def test_linear_attention_is_refused():
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    )
    with pytest.raises(ValueError, match="Qwen3NextForCausalLM.*mixes packed examples"):
        check_packing(Qwen3NextForCausalLM(config))


@pytest.mark.quick
def test_the_check_leaves_the_model_as_it_was():
    model = models.TINY_MODELS["olmoe"]().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        check_packing(model)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.quick
def test_flash_attention_packs_one_row_at_a_time(monkeypatch):
    model = models.TINY_MODELS["olmoe"]()
    rows = examples(4, 3, 2, 5)
    monkeypatch.setattr("moe_unlearn.data.packing.check_packing", lambda model: None)  # needs the library
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match="flash_attention_2 keeps packed examples apart in a batch of one row only"):
        packed_batches(rows, 8, model=model, batch_size=2)
    assert len(packed_batches(rows, 8, model=model)) == 2


@pytest.mark.quick
def test_bad_arguments_are_named():
    model = models.TINY_MODELS["olmoe"]()
    with pytest.raises(ValueError, match="batch_size of at least 1; got 0"):
        packed_batches(examples(3), 8, model=model, batch_size=0)
    with pytest.raises(ValueError, match="at least one example"):
        packed_batches([], 8, model=model)
