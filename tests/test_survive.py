"""Rounding-proof weights: rounding the model that is saved gives the codes chosen, and keeps what unlearning did."""

import copy
from types import SimpleNamespace

import pytest
import torch

from moe_unlearn import data, survive
from moe_unlearn.audit.weights import restored
from moe_unlearn.benchmark import tiny_models
from moe_unlearn.model.grids import GRIDS, linear_weights
from moe_unlearn.ops.bits import pack_bits

NAMES = [grid.name for grid in GRIDS]
SETTINGS = tiny_models.Settings(
    forget=5, retain=20, holdout=4, max_length=24, vocab_size=300, hidden_size=32, intermediate_size=16, layers=2,
    heads=2, experts=4, top_k=2,
)  # fmt: skip


def operands(dtype=torch.float32, experts=3, outputs=6, inputs=20, seed=0):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(experts, outputs, inputs, generator=draw).to(dtype)
    x = torch.randn(experts, 64, inputs, generator=draw) @ torch.randn(inputs, inputs, generator=draw)
    return weight, x.mT @ x / 64


def cost(grid, weight, former, second):
    error = grid.rounded(weight, 2).float() - former.float()
    return ((error @ second) * error).sum(-1)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", GRIDS, ids=NAMES)
def test_rounding_what_was_moved_errs_less_on_the_inputs_than_rounding_what_was_not(grid, dtype):
    weight, second = operands(dtype)
    own = survive.settled(weight, second, grid)
    assert own.dtype == dtype
    before, after = cost(grid, weight, weight, second), cost(grid, own, weight, second)
    damped = 0.01 * second.diagonal(dim1=-2, dim2=-1).mean()
    assert (after <= before * 1.01 + damped).all() and after.sum() < 0.7 * before.sum()
    # the scales are those of before, and a weight whose code is so too is the same to the bit
    (codes, scale), (former, was) = (grid.codes(w, 2) for w in (own, weight))
    assert torch.equal(scale, was)
    same = (codes == former).flatten(-2)[..., :20]
    assert torch.equal(own[same], weight[same]) and not same.all()


@pytest.mark.quick
def test_weights_that_may_not_move_stay_and_inputs_that_were_never_seen_move_nothing():
    weight, second = operands()
    may = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    own = survive.settled(weight, second, GRIDS[1], may)
    assert torch.equal(own[~may], weight[~may]) and not torch.equal(own, weight)
    assert torch.equal(survive.settled(weight, torch.zeros_like(second), GRIDS[1]), weight)


@pytest.fixture(scope="module")
def run():
    """A tiny model with biases nowhere and experts that all see rows, and the batches of both sides."""
    tokenizer, forget, retain, _ = tiny_models.build_data("builtin:pydoc", 0, SETTINGS)
    return SimpleNamespace(
        model=tiny_models.tiny_olmoe(len(tokenizer), 0, SETTINGS),
        sides=[data.batches(rows, 5) for rows in (forget, retain)],
    )


def test_the_inputs_of_every_weight_are_those_that_the_model_gives_it(run):
    names = [name for name in linear_weights(run.model) if ".1." in name]
    found = survive._moments(run.model, run.sides[1], names)
    batch, seen = run.sides[1][0], {}
    layer = run.model.model.layers[1]
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args: seen.update(o=args[0])),
        layer.mlp.experts.register_forward_pre_hook(lambda m, args: seen.update(experts=args)),
    ]
    sums = {"o": 0.0, "up": 0.0, "down": 0.0}
    for batch in run.sides[1]:
        mask = batch["attention_mask"].bool()
        with torch.no_grad():
            run.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        hidden, index, weights = (given[mask.flatten()] for given in seen["experts"])
        share = torch.where(index == 2, weights, 0).sum(-1, keepdim=True)
        own = hidden[(index == 2).any(-1)]
        gate, up = (own @ layer.mlp.experts.gate_up_proj[2].detach().T).chunk(2, -1)
        made = torch.nn.functional.silu(gate) * up * share[(index == 2).any(-1)]
        o = seen["o"][mask]
        for name, x in (("o", o), ("up", own), ("down", made)):
            sums[name] = sums[name] + x.T @ x
    for handle in handles:
        handle.remove()
    tokens = sum(int(batch["attention_mask"].sum()) for batch in run.sides[1])
    prefix = "model.layers.1"
    for name, own in (
        ("o", found[f"{prefix}.self_attn.o_proj.weight"]),
        ("up", found[f"{prefix}.mlp.experts.gate_up_proj"][2]),
        ("down", found[f"{prefix}.mlp.experts.down_proj"][2]),
    ):
        torch.testing.assert_close(own, sums[name] / tokens, rtol=1e-4, atol=1e-7)


def test_a_model_that_is_held_answers_after_int4_more_like_itself_and_what_does_not_train_stays(run):
    model, grid = copy.deepcopy(run.model), survive.grid_of("int4")
    model.model.layers[0].self_attn.requires_grad_(False)
    former = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = {"model.layers.1.mlp.experts.down_proj": pack_bits(torch.zeros(4, 32, 16, dtype=torch.bool))}
    batch = run.sides[1][0]

    def logits(rounded):
        weights = linear_weights(model).values()
        with restored(weight for weight, _ in weights), torch.no_grad():
            for weight, inputs in weights if rounded else ():
                weight.copy_(grid.rounded(weight, inputs))
            return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    before, plain = logits(False), logits(True)
    moved = survive.hold(model, "int4", *run.sides, masks)
    held = logits(True)
    assert (held - before).square().mean() < 0.8 * (plain - before).square().mean()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, former[name])}
    assert moved.moved > 0 and changed < set(linear_weights(model))
    assert not any("layers.0.self_attn" in name for name in changed) and changed.isdisjoint(masks)
    assert survive.memory(model) > 0


def test_weights_that_are_no_ones_own_are_refused(run, monkeypatch):
    monkeypatch.setattr(survive, "sharded", lambda model: True)
    with pytest.raises(ValueError, match="survive moves whole weights, which a mesh shares out"):
        survive.hold(run.model, "int4", *run.sides)
    monkeypatch.undo()
    adapted = copy.copy(run.model)
    adapted.peft_config = {}
    with pytest.raises(ValueError, match="not those of adapters: survive=null"):
        survive.hold(adapted, "int4", *run.sides)


@pytest.mark.quick
def test_another_grid_is_refused():
    with pytest.raises(ValueError, match="expected a grid int8, int4, nf4; got 'int3'"):
        survive.grid_of("int3")
