"""The mask made group by group within a budget of memory: the same bytes as made at once, and what a group costs."""

import logging

import pytest
import torch
from torch import nn

from moe_unlearn.config import Recipe
from moe_unlearn.experts import enable, experts_modules
from moe_unlearn.model.batches import target_mask
from moe_unlearn.model.head import token_losses
from moe_unlearn.model.one_copy import BLOCK
from moe_unlearn.plan.memory import measured_peak
from moe_unlearn.wagle import gradients, mask, weight_mask
from moe_unlearn.wagle.budget import budget_of, free_memory, left_in_groups
from moe_unlearn.wagle.gradients import Side
from moe_unlearn.wagle.pieces import Piece, all_pieces, grouped
from tests.support.batches import random_batch, random_batches
from tests.support.models import TINY_MODELS
from tests.support.steps import VOCAB, prepared, recipe

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def passes(monkeypatch):
    """The groups of pieces whose gradients were computed, each as names and elements."""
    seen, real = [], mask._Scores.of

    def of(self, pieces):
        seen.append([(piece.name, piece.elements) for piece in pieces])
        return real(self, pieces)

    monkeypatch.setattr(mask._Scores, "of", of)
    return seen


def batches():
    return [random_batch(VOCAB, rows=3, seed=1), random_batch(VOCAB, rows=1, length=7, seed=2)], random_batches(
        VOCAB, 2
    )


def made(family="olmoe", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return TINY_MODELS[family](vocab_size=VOCAB, **changes).to(dtype).eval()


def size_of(model, part=1.0):
    """The bytes of both gradients of all weights that train, or a part of them."""
    return int(sum(piece.nbytes for piece in all_pieces(model, None)) * part)


def equal(ours, theirs):
    """Whether two masks are the same, and would be in a file."""
    same = all(torch.equal(ours.packed[name], words) for name, words in theirs.packed.items())
    return same and list(ours.packed) == list(theirs.packed) and ours.magnitudes == theirs.magnitudes


WAYS = (
    (("float32", "moe_unlearn"), ("bfloat16", "eager")),
    (("bfloat16", "moe_unlearn"), ("float32", "grouped_mm")),
)
# every family, and every way with one; the other way of the others is nightly
CASES = [
    pytest.param(
        family,
        dtype,
        implementation,
        id=f"{family} {dtype} {implementation}",
        marks=pytest.mark.nightly if way and i >= len(WAYS) else (),
    )
    for i, family in enumerate(TINY_MODELS)
    for way, (dtype, implementation) in enumerate(WAYS[i % 2])
]


@pytest.mark.slow(but=2)
@pytest.mark.parametrize(("family", "dtype", "implementation"), CASES)
def test_a_budget_does_not_change_a_bit(family, dtype, implementation, passes):
    model, sides = made(family, getattr(torch, dtype), implementation=implementation), batches()
    for official, parts in ((False, (0.7, 0.12)), (True, (0.3,))):
        settings = {"keep": 0.95 if official else 0.3, "gamma": 0.1, "official": official}
        passes.clear()
        at_once = weight_mask(model, *sides, **settings)
        assert len(passes) == 1
        for part in parts:
            passes.clear()
            assert equal(weight_mask(model, *sides, **settings, memory=size_of(model, part)), at_once), part
            assert len(passes) > 1 / part


def test_a_good_guess_makes_one_round_enough(passes):
    model, sides = made(hidden_size=96), batches()
    at_once = weight_mask(model, *sides, keep=0.5, gamma=0.1)
    passes.clear()
    assert equal(weight_mask(model, *sides, keep=0.5, gamma=0.1, memory=size_of(model, 0.5)), at_once)
    sample, *groups = passes
    assert len(groups) == 3  # a part of the budget is for remembered scores
    covered = [(name, at) for group in groups for name, at in group]
    assert sorted(name for name, _ in sample) == sorted({name for name, _ in covered})
    for name, p in model.named_parameters():
        elements = [at for found, at in covered if found == name]
        assert [at.start for at in elements] == [0, *(at.stop for at in elements[:-1])]
        assert elements[-1].stop == p.numel()


@pytest.mark.parametrize("wrong", [range(1, 2), range(0x7F000000, 0x7F000001), range(1, 0x7F800000)])
def test_a_wrong_guess_or_too_many_scores_cost_a_round_and_no_bit(wrong, passes, monkeypatch):
    model, sides = made(), batches()
    at_once = weight_mask(model, *sides, keep=0.3, gamma=0.1)
    monkeypatch.setattr(mask, "guess_of", lambda *_: (wrong, 0.1))
    passes.clear()
    assert equal(weight_mask(model, *sides, keep=0.3, gamma=0.1, memory=size_of(model, 0.5)), at_once)
    groups = passes[1:]
    assert len(groups) == 2 * len({str(group) for group in groups})  # the second round knows the interval


def test_a_gradient_is_that_of_plain_autograd_whichever_others_are_computed():
    """In bfloat16, where autograd adds the gradients of a weight's several uses before the sum over batches."""
    model = made(dtype=torch.bfloat16, num_hidden_layers=3)
    model.model.layers[2].mlp.experts = model.model.layers[0].mlp.experts
    side = Side.of("forget", batches()[1], token_losses, None)
    with enable(model):
        expected = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
        for batch in side.batches:
            (token_losses(model, batch).sum() / sum(int(target_mask(b).sum()) for b in side.batches)).backward()
            for name, p in model.named_parameters():
                expected[name] += p.grad
                p.grad = None
        pieces = all_pieces(model, None)
        for groups in (grouped(pieces, None), grouped(pieces, size_of(model, 0.06))):
            for group in groups:
                for piece, gradient in gradients.gradients(model, side, group, None).items():
                    at = piece.elements
                    assert torch.equal(gradient, expected[piece.name].flatten()[at.start : at.stop])


def test_a_gradient_is_added_without_a_copy_of_it_in_the_dtype_of_sums(measurable_memory):
    weight = torch.nn.Parameter(torch.zeros(3 * BLOCK + 1, dtype=torch.bfloat16))
    piece, values = Piece("weight", weight, range(weight.numel())), torch.ones_like(weight)
    store = gradients._Store([piece])
    store.add(piece, values, 0)
    with measured_peak("cpu") as measured:
        store.add(piece, values, 0)
    assert measured.peak <= 4 * BLOCK
    assert torch.equal(store.sums[piece], torch.full((weight.numel(),), 2.0))


def test_other_weights_get_no_gradient_and_the_backward_pass_stops_below_the_group(monkeypatch):
    model, side = made(num_hidden_layers=3), Side.of("forget", batches()[0], token_losses, None)
    needed, listed, real = [], [], gradients.expert_wgrad
    for layer in model.model.layers:
        layer.register_forward_hook(lambda layer, args, out: needed.append(out.requires_grad))
    monkeypatch.setattr(
        gradients,
        "expert_wgrad",
        lambda *a, experts, **k: listed.append(experts.tolist()) or real(*a, experts=experts, **k),
    )
    name = "model.layers.1.mlp.experts.down_proj"
    p = model.get_parameter(name)
    piece = Piece(name, p, range(0, p.numel())).between(2 * p.shape[1], 4 * p.shape[1] - 1)
    with enable(model):
        found = gradients.gradients(model, side, [piece], None)
    assert list(found) == [piece] and found[piece].shape == (2 * p[0].numel() - p.shape[2],)
    assert needed == [False, True, True] * len(side.batches)
    assert listed == [[2, 3]] * len(side.batches)


@pytest.mark.parametrize("memory", [None, 0.3])
def test_the_model_is_left_as_it_was_after_an_error_too(memory):
    model, (forget, retain) = made(implementation="moe_unlearn"), batches()
    frozen, kept = model.model.norm.weight.requires_grad_(False), torch.ones_like(model.lm_head.weight)
    model.lm_head.weight.grad = kept
    model.train()
    model.model.layers[0].eval()

    def state():
        flags = [(p.requires_grad, p.grad, len(p._post_accumulate_grad_hooks or ())) for p in model.parameters()]
        inputs = [vars(m).get("_moe_unlearn").inputs for m in experts_modules(model).values()]
        return flags, [m.training for m in model.modules()], inputs

    calls = []

    def broken(model, batch):
        calls.append(batch)
        if len(calls) == 4:
            raise ZeroDivisionError
        return token_losses(model, batch)

    budget = {"memory": memory and size_of(model, memory)}
    weight_mask(model, forget, retain, keep=0.5, gamma=1.0, **budget)
    before = state()
    assert not frozen.requires_grad and model.lm_head.weight.grad is kept and before[2] == [None] * 2
    with pytest.raises(ZeroDivisionError):
        weight_mask(model, forget * 2, retain, keep=0.5, gamma=1.0, forget_loss=broken, **budget)
    assert str(state()) == str(before)


@pytest.mark.parametrize("official", [False, True])
def test_ties_zeros_and_frozen_weights_across_groups(official):
    """Scores that are small integers: every count of kept weights, with the smallest budget that there is."""
    model = nn.Module()
    model.weights = nn.ParameterList(
        nn.Parameter(torch.ones(shape)) for shape in ((), (5, 7), (0, 3), (2, 3, 4), (33,))
    )
    model.weights[3].requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randint(-2, 3, p.shape, generator=generator).float() for p in model.weights]
    ids = torch.ones(1, 2, dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": ids}

    def loss(model, batch):
        return sum((p * f).sum() for p, f in zip(model.weights, factors, strict=True)).view(1, 1)

    def zero(model, batch):
        return 0 * loss(model, batch)

    total = sum(p.numel() for p in model.parameters())
    least = 2 * 4 * 33
    for count in range(0, total + 1, 3):
        settings = {"keep": (count + 0.5) / (total + 1), "gamma": 1.0, "official": official}
        settings |= {"forget_loss": loss, "retain_loss": zero}
        at_once = weight_mask(model, [batch], [batch], **settings)
        for memory in (least, least + 20, 2 * least):
            assert equal(weight_mask(model, [batch], [batch], **settings, memory=memory), at_once)
    with pytest.raises(ValueError, match=rf"at least {least} bytes, .* one row of weights\.4 take; got {least - 1}"):
        weight_mask(model, [batch], [batch], **settings, memory=least - 1)


def test_pieces_are_layers_or_experts_or_rows_of_one():
    model = made()
    pieces = all_pieces(model, None)
    for size in (size_of(model, 0.6), 2 * 4 * 3 * 48 * 32, 2 * 4 * 5 * 32):  # 3 experts of gate_up_proj, 5 of its rows
        groups = grouped(pieces, size)
        assert all(sum(piece.nbytes for piece in group) <= size for group in groups)
        flat = [piece for group in groups for piece in group]
        for piece in pieces:
            own = [cut.elements for cut in flat if cut.name == piece.name]
            assert [e for at in own for e in at] == list(piece.elements)
            if piece.parameter.dim() == 3 and size >= 2 * 4 * 48 * 32:  # a group holds an expert
                assert all(at.start % piece.parameter[0].numel() == 0 for at in own)


def test_a_budget_is_bytes_or_a_text_and_by_default_most_of_what_is_free(monkeypatch):
    pieces = all_pieces(made(), None)
    needed = sum(piece.nbytes for piece in pieces)
    assert budget_of(pieces, needed).gradients is None and budget_of(pieces, needed - 1).gradients < needed
    assert budget_of(pieces, "1GiB").size == 1 << 30 and budget_of(pieces, "0.5 MB").size == 500_000
    assert 1 << 20 < free_memory(torch.device("cpu")) < 1 << 50
    monkeypatch.setattr("moe_unlearn.wagle.budget.free_memory", lambda device: needed)
    assert budget_of(pieces, None).size == int(0.75 * needed)
    for wrong in ("lots", "-1", True, "1e3", "5 XB"):
        with pytest.raises(ValueError, match="memory must be an amount of memory, such as 512MiB or 32GB; got"):
            budget_of(pieces, wrong)
    with pytest.raises(ValueError, match="wagle.memory must be an amount of memory"):
        Recipe.load("wagle", ["wagle.memory=lots"])


@pytest.mark.parametrize("version", [1, 2])
def test_what_files_have_left_in_memory_is_free_to_a_group(version, tmp_path):
    names = {1: ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat")}
    names[2] = ("memory.max", "memory.current", "memory.stat")
    prefix = "total_" if version == 1 else ""
    said = ("1000", "900", f"inactive_file 1\n{prefix}inactive_file 600\n{prefix}active_file 100\n")
    for name, text in zip(names[version], said, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="ascii")
    assert left_in_groups(tmp_path) == [700]
    (tmp_path / names[version][0]).write_text("max", encoding="ascii")
    assert left_in_groups(tmp_path) == []


def test_a_limit_on_the_process_counts(monkeypatch):
    import resource

    free = free_memory(torch.device("cpu"))
    with open("/proc/self/statm", encoding="ascii") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    real = resource.getrlimit
    limited = {resource.RLIMIT_AS: (held + (1 << 28), held + (1 << 28))}
    monkeypatch.setattr(resource, "getrlimit", lambda which: limited.get(which) or real(which))
    assert free_memory(torch.device("cpu")) <= 1 << 28 < free


def test_each_group_is_logged_with_the_time_left(caplog):
    model = made()
    with caplog.at_level(logging.INFO):
        weight_mask(model, *batches(), keep=0.5, gamma=1.0, memory=size_of(model, 0.7))
    lines = [record.getMessage() for record in caplog.records if "group" in record.getMessage()]
    assert "group 1 of" in lines[0] and "model.embed_tokens.weight" in lines[0] and "s left" in lines[0]
    assert "lm_head.weight) is scored; about 0 s left" in lines[-1]
    assert "mean |theta g_f|" in caplog.text


def test_the_recipe_has_the_budget_and_a_state_may_differ_in_it(passes):
    model, masks = made(), []
    for memory in (size_of(model, 0.3), "null"):
        step = prepared(model, recipe("wagle", f"wagle.memory={memory}"))[0]
        masks.append(step.prepared.mask)
        state = step.state_dict()
        step.close()
    assert len(passes) > 3 and equal(*masks)
    del state["recipe"]["wagle"]["memory"]  # as an earlier version saved it
    other = prepared(model, recipe("wagle", "wagle.memory=1GiB"))[0]
    other.load_state_dict(state)
    state["recipe"]["wagle"]["keep"] = 0.123
    with pytest.raises(ValueError, match="another recipe: wagle.keep was 0.123"):
        other.load_state_dict(state)
