"""The weight mask against one long sorted vector, in both modes; what it reports, saves and refuses."""

import json
import logging
import stat
import struct

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from moe_unlearn import UnlearnStep
from moe_unlearn.checkpoint import tensor_file
from moe_unlearn.config import Recipe, shipped
from moe_unlearn.masks.weight_mask import FORMAT
from moe_unlearn.model.batches import target_mask
from moe_unlearn.model.head import token_losses
from moe_unlearn.ops.bits import num_words
from moe_unlearn.trace import routing_frequencies
from moe_unlearn.wagle import WeightMask, scores, weight_mask
from tests.support.batches import random_batch, random_batches
from tests.support.models import tiny_gpt_oss, tiny_olmoe

VOCAB = 64


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_olmoe(vocab_size=VOCAB).eval()


def data(seed=0):
    """Batches of different token counts, so that a mean of means is not the mean."""
    forget = [
        random_batch(VOCAB, rows=3, seed=seed + 1),
        random_batch(VOCAB, rows=1, length=7, seed=seed + 2),
    ]
    return forget, random_batches(VOCAB, 2, seed=seed + 3)


def torch_gradients(model, batches, official):
    """Plain autograd: sums over batches of means, or the mean over all tokens; zeros where there is none."""
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    counts = [int(target_mask(b).sum()) for b in batches]
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for batch, count in zip(batches, counts, strict=True):
        loss = token_losses(model, batch).sum() / (count if official else sum(counts))
        trained = [p for p in model.parameters() if p.requires_grad]
        for name, g in zip(names, torch.autograd.grad(loss, trained, allow_unused=True), strict=True):
            total[name] = total[name] if g is None else total[name] + g
    return total


def brute_force(model, forget, retain, keep, gamma, official):
    """One vector of |S| over the model, a stable double argsort, and the kept set by rank."""
    g_f, g_r = (torch_gradients(model, b, official) for b in (forget, retain))
    scores = torch.cat(
        [((p - g_r[n] / torch.tensor(gamma)) * g_f[n]).abs().flatten() for n, p in model.named_parameters()]
    ).detach()
    rank = scores.argsort(descending=True, stable=True).argsort()
    kept = rank < int(keep * len(scores))
    return kept if official else kept & (scores > 0)


def flat(mask):
    return torch.cat([mask.kept(name).flatten() for name in mask.names])


@pytest.mark.quick
@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("keep,gamma", [(0.3, 1.0), (0.85, 1e-6), (0.05, 1e3), (1.0, 1.0)])
def test_equals_one_long_sort(model, official, keep, gamma):
    forget, retain = data()
    mask = weight_mask(model, forget, retain, keep=keep, gamma=gamma, official=official)
    expected = brute_force(model, forget, retain, keep, gamma, official)
    assert torch.equal(flat(mask), expected)
    assert mask.names == [n for n, _ in model.named_parameters()]
    assert mask.fraction == float(expected.sum()) / len(expected)
    assert (mask.keep, mask.gamma, mask.official) == (keep, gamma, official)


def accelerate_gradients(model, batches, accumulation):
    """Sums over batches of the gradients that accelerate's backward leaves for the mean loss of each."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    try:
        for batch in batches:
            accelerator.backward(token_losses(model, batch).sum() / target_mask(batch).sum())
    finally:
        AcceleratorState._reset_state(True)
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    return grads


@pytest.mark.quick
@pytest.mark.slow
def test_official_mode_scores_what_accelerate_accumulates(model):
    forget, retain = data()
    arguments = {"keep": 0.5, "gamma": 1e-2, "official": True}
    g_f, g_r = (accelerate_gradients(model, b, 4) for b in (forget, retain))
    scores = torch.cat(
        [((p - g_r[n] / torch.tensor(1e-2)) * g_f[n]).abs().flatten() for n, p in model.named_parameters()]
    ).detach()
    expected = scores.argsort(descending=True, stable=True).argsort() < int(0.5 * len(scores))
    mask = weight_mask(model, forget, retain, **arguments, accumulation=4)
    assert torch.equal(flat(mask), expected)
    # the ranking is that of gamma times 4, up to the rounding of scores next to the threshold
    scaled = weight_mask(model, forget, retain, **{**arguments, "gamma": 4e-2})
    without = weight_mask(model, forget, retain, **arguments)
    assert int((flat(mask) != flat(scaled)).sum()) < 20 < int((flat(mask) != flat(without)).sum())


@pytest.mark.quick
def test_accumulation_belongs_to_official_mode(model):
    forget, retain = data()
    for keywords in ({"accumulation": 4}, {"accumulation": 0, "official": True}):
        with pytest.raises(ValueError, match="accumulation must be at least 1, and 1 without official; got"):
            weight_mask(model, forget, retain, keep=0.5, gamma=1.0, **keywords)
    with pytest.raises(ValueError, match="wagle.accumulation goes with wagle.official; got 4 without it"):
        Recipe.load("wagle", ["wagle.accumulation=4"])


@pytest.mark.quick
@pytest.mark.slow
def test_official_recipes_count_their_micro_batches(model):
    official = [r for r in map(Recipe.load, shipped()) if r.wagle is not None and r.wagle.official]
    assert len(official) == 7
    assert {(r.wagle.accumulation, r.accumulate) for r in official} == {(4, 4)}
    forget, retain = data()
    settings = ["wagle.keep=0.5", "wagle.gamma=1e-2", "wagle.official=true", "wagle.accumulation=4"]
    step = UnlearnStep(model, Recipe.load("wagle", settings))
    step.prepare(forget, retain)
    expected = weight_mask(model, forget, retain, keep=0.5, gamma=1e-2, official=True, accumulation=4)
    assert torch.equal(flat(step.prepared.mask), flat(expected))


@pytest.mark.quick
@pytest.mark.slow
def test_official_mode_keeps_exactly_the_number_asked(model):
    forget, retain = data()
    total = sum(p.numel() for p in model.parameters())
    for keep in (0.1, 0.4, 0.95, 0.99, 1.0):
        mask = weight_mask(model, forget, retain, keep=keep, gamma=1.0, official=True)
        assert int(flat(mask).sum()) == int(keep * total)


@pytest.mark.quick
@pytest.mark.slow
def test_the_modes_differ_and_native_ignores_how_the_set_is_batched(model):
    forget, retain = [random_batch(VOCAB, rows=4, seed=1)], [random_batch(VOCAB, rows=4, seed=2)]
    split = [{k: v[rows] for k, v in forget[0].items()} for rows in (slice(0, 1), slice(1, 4))]
    arguments = {"keep": 0.5, "gamma": 0.01}
    native = [flat(weight_mask(model, f, retain, **arguments)) for f in (forget, split)]
    official = [flat(weight_mask(model, f, retain, **arguments, official=True)) for f in (forget, split)]
    # other batches round differently: only scores next to the threshold may cross it
    assert int((native[0] != native[1]).sum()) < 20 < int((official[0] != official[1]).sum())


@pytest.mark.quick
def test_the_sign_of_the_forget_loss_does_not_matter(model):
    forget, retain = data()

    def ascent(model, batch):
        return -token_losses(model, batch)

    masks = [
        weight_mask(model, forget, retain, keep=0.4, gamma=0.1, forget_loss=loss) for loss in (token_losses, ascent)
    ]
    assert torch.equal(flat(masks[0]), flat(masks[1]))


@pytest.mark.quick
def test_experts_that_are_never_routed_to_freeze_themselves(model):
    forget, retain = [random_batch(VOCAB, rows=1, length=5, seed=1)], data()[1]
    # in the last layer only the counted positions reach the loss
    routed = routing_frequencies(model, forget).counts[1] > 0
    assert routed.any() and not routed.all(), "the case needs an expert without a token"
    native = weight_mask(model, forget, retain, keep=1.0, gamma=1.0)
    owner = "model.layers.1.mlp.experts"
    for name in (f"{owner}.gate_up_proj", f"{owner}.down_proj"):
        assert not native.kept(name)[~routed].any() and native.kept(name)[routed].any()
    assert native.fraction < 1.0 and torch.equal(native.fraction_per_expert[owner] == 0, ~routed)
    official = weight_mask(model, forget, retain, keep=1.0, gamma=1.0, official=True)
    assert official.fraction == 1.0


class Line(nn.Module):
    """theta . x: gradients are what a test writes into its batches."""

    def __init__(self, *sizes):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(n)) for n in sizes])


def line_batch(*gradients):
    ones = torch.ones(1, 2, dtype=torch.int64)
    return {
        "input_ids": ones,
        "attention_mask": ones,
        "labels": ones,
        "g": [torch.tensor(g) for g in gradients],
    }


def line_loss(model, batch):
    return sum((p * g).sum() for p, g in zip(model.weights, batch["g"], strict=True)).view(1, 1)


def line_mask(model, g_f, g_r, **keywords):
    losses = {"forget_loss": line_loss, "retain_loss": line_loss}
    return weight_mask(model, [line_batch(*g_f)], [line_batch(*g_r)], **losses, **keywords)


@pytest.mark.quick
def test_ties_go_by_parameter_order_then_flat_index():
    model, zero = Line(3, 4), ([0.0] * 3, [0.0] * 4)
    g_f = ([1.0, 2.0, 1.0], [1.0, 3.0, 1.0, 1.0])
    # 4 of 7: 3, 2 and then the first two of the ones, both in the first parameter
    mask = line_mask(model, g_f, zero, keep=4.5 / 7, gamma=1.0)
    assert flat(mask).tolist() == [True, True, True, False, True, False, False]
    more = line_mask(model, g_f, zero, keep=5.5 / 7, gamma=1.0)
    assert flat(more).tolist() == [True, True, True, True, True, False, False]
    assert mask.differing(more) == more.differing(mask) == {"weights.0": 0, "weights.1": 1}
    with pytest.raises(ValueError, match="expected two masks of one model"):
        mask.differing(line_mask(Line(2), ([1.0, 2.0],), ([0.0, 0.0],), keep=0.5, gamma=1.0))


@pytest.mark.quick
def test_zeros_are_kept_in_official_mode_only():
    model, zero = Line(3, 4), ([0.0] * 3, [0.0] * 4)
    g_f = ([0.0, 2.0, 0.0], [0.0, -3.0, 0.0, 0.0])
    native = line_mask(model, g_f, zero, keep=5.5 / 7, gamma=1.0)
    official = line_mask(model, g_f, zero, keep=5.5 / 7, gamma=1.0, official=True)
    assert flat(native).nonzero().flatten().tolist() == [1, 4] and native.fraction == 2 / 7
    assert flat(official).nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    nothing = line_mask(model, zero, zero, keep=0.5, gamma=1.0)
    assert not flat(nothing).any()
    assert not flat(line_mask(model, g_f, zero, keep=0.1, gamma=1.0)).any()  # int(0.7) = 0


@pytest.mark.quick
def test_the_score_has_both_terms_and_they_are_logged(caplog):
    model = Line(2)
    # S = (1 - g_r / gamma) g_f = (0, 1): the first weight's terms cancel
    with caplog.at_level(logging.INFO):
        mask = line_mask(model, ([4.0, 1.0],), ([2.0, 0.0],), keep=1.0, gamma=2.0)
    assert flat(mask).tolist() == [False, True]
    assert mask.magnitudes == {"forget_term": 2.5, "retain_term": 2.0}
    assert "2.500e+00" in caplog.text and "2.000e+00" in caplog.text


@pytest.mark.quick
def test_frozen_parameters_score_zero(model):
    frozen = "model.layers.0.mlp.experts.down_proj"
    model.get_parameter(frozen).requires_grad_(False)
    forget, retain = data()
    native = weight_mask(model, forget, retain, keep=1.0, gamma=1.0)
    assert not native.kept(frozen).any()
    official = weight_mask(model, forget, retain, keep=0.99, gamma=1.0, official=True)
    assert torch.equal(flat(official), brute_force(model, forget, retain, 0.99, 1.0, True))


@pytest.mark.quick
@pytest.mark.slow
def test_tied_tensors_count_once():
    torch.manual_seed(0)
    model = tiny_olmoe(vocab_size=VOCAB).eval()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    forget, retain = data()
    mask = weight_mask(model, forget, retain, keep=0.5, gamma=1.0)
    assert "lm_head.weight" not in mask.names
    assert torch.equal(flat(mask), brute_force(model, forget, retain, 0.5, 1.0, False))
    mask.check(model)


@pytest.mark.quick
def test_the_model_is_left_as_it_was(model):
    forget, retain = data()
    model.train()
    model.model.layers[0].eval()
    modes = {m: m.training for m in model.modules()}
    sentinel = torch.ones_like(model.lm_head.weight)
    model.lm_head.weight.grad = sentinel
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():  # a caller's mode does not matter
        weight_mask(model, forget, retain, keep=0.5, gamma=1.0)
    assert model.lm_head.weight.grad is sentinel and bool((sentinel == 1).all())
    assert all(p.grad is None for n, p in model.named_parameters() if n != "lm_head.weight")
    assert modes == {m: m.training for m in model.modules()}
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())

    def broken(model, batch):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        weight_mask(model, forget, retain, keep=0.5, gamma=1.0, forget_loss=broken)
    assert model.lm_head.weight.grad is sentinel and modes == {m: m.training for m in model.modules()}


@pytest.mark.quick
def test_bfloat16_models_accumulate_in_float32(model, monkeypatch):
    """Sums of many bfloat16 gradients in bfloat16 would lose the last ones."""
    dtypes, real = set(), scores.score_histogram

    def spy(*terms, **keywords):
        dtypes.add(tuple(t.dtype for t in terms))
        return real(*terms, **keywords)

    monkeypatch.setattr(scores, "score_histogram", spy)
    weight_mask(model.to(torch.bfloat16), *data(), keep=0.5, gamma=1.0)
    assert dtypes == {(torch.bfloat16, torch.float32, torch.float32)}


@pytest.mark.quick
def test_reported_fractions_add_up():
    torch.manual_seed(0)
    model = tiny_gpt_oss(vocab_size=VOCAB).eval()
    mask = weight_mask(model, *data(), keep=0.4, gamma=1.0)
    sizes, kept = {}, {}
    for name, p in model.named_parameters():
        layer = ".".join(name.split(".")[:3]) if name.startswith("model.layers.") else "outside layers"
        sizes[layer] = sizes.get(layer, 0) + p.numel()
        kept[layer] = kept.get(layer, 0) + int(mask.kept(name).sum())
    assert mask.fraction_per_layer == {layer: kept[layer] / sizes[layer] for layer in sizes}
    kind = [mask.kept(f"model.layers.{i}.mlp.experts.down_proj") for i in (0, 1)]
    expected = sum(int(k.sum()) for k in kind) / sum(k.numel() for k in kind)
    assert mask.fraction_per_kind["mlp.experts.down_proj"] == expected
    owner = "model.layers.1.mlp.experts"
    own = [mask.kept(n) for n in mask.names if n.startswith(owner)]
    assert len(own) == 4, "weights and biases"
    per_expert = torch.stack([sum(k[e].sum() for k in own) / sum(k[e].numel() for k in own) for e in range(4)])
    assert torch.equal(mask.fraction_per_expert[owner].float(), per_expert)
    assert set(mask.fraction_per_expert) == {owner, owner.replace("1", "0")}


@pytest.mark.quick
def test_words_have_the_shared_layout(model):
    mask = weight_mask(model, *data(), keep=0.4, gamma=1.0)
    for name, p in model.named_parameters():
        assert mask.words(name).shape == (*p.shape[:-1], num_words(p.shape[-1]))
        assert mask.words(name).dtype == torch.int32


def equal(a, b):
    return (
        a.names == b.names
        and a.shapes == b.shapes
        and all(torch.equal(a.words(n), b.words(n)) for n in a.names)
        and (a.keep, a.gamma, a.official, a.magnitudes) == (b.keep, b.gamma, b.official, b.magnitudes)
    )


@pytest.mark.quick
def test_saved_and_restored_masks_are_the_same(model, tmp_path):
    mask = weight_mask(model, *data(), keep=0.4, gamma=0.5, official=True)
    path = tmp_path / "new" / "mask.safetensors"
    mask.save(path)
    mask.save(path)  # over an existing file
    assert [p.name for p in path.parent.iterdir()] == ["mask.safetensors"], "no temporary file stays"
    assert stat.S_ISREG(path.stat().st_mode)
    assert equal(WeightMask.load(path), mask)
    assert equal(WeightMask.from_state_dict(mask.state_dict()), mask)
    WeightMask.load(path).check(model)


@pytest.mark.quick
def test_a_failed_save_leaves_the_old_file(model, tmp_path, monkeypatch):
    mask = weight_mask(model, *data(), keep=0.4, gamma=0.5)
    path = tmp_path / "mask.safetensors"
    mask.save(path)
    before = path.read_bytes()

    def full_disk(words):
        raise OSError("no space left on device")

    monkeypatch.setattr(tensor_file, "bytes_of", full_disk)
    with pytest.raises(OSError, match="no space"):
        mask.save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def state_of(**change):
    state = {"shapes": [["a", [2, 40]]], "keep": 0.5, "gamma": 1.0, "official": False, "magnitudes": {}}
    return json.dumps({**state, **change})


def write_sealed(path, tensors, metadata):
    """A file with the digest of what it holds, as an attacker would write it."""
    kinds = {name: tensor_file.kind_of(tensor) for name, tensor in tensors.items()}
    with tensor_file.tensor_file(path, kinds, metadata, sealed=True) as write:
        for name, tensor in tensors.items():
            write(name, tensor)


WORDS = {"a": torch.ones(2, 2, dtype=torch.int32)}
HOSTILE = {
    "no metadata": (WORDS, None),
    "other format": (WORDS, {"format": "something else", "state": state_of()}),
    "no state": (WORDS, {"format": FORMAT}),
    "state no json": (WORDS, {"format": FORMAT, "state": "{"}),
    "state no dict": (WORDS, {"format": FORMAT, "state": "[1]"}),
    "deep state": (WORDS, {"format": FORMAT, "state": "[" * 100000}),
    "shape wrong": (WORDS, {"format": FORMAT, "state": state_of(shapes=[["a", [2, 70]]])}),
    "shape negative": (WORDS, {"format": FORMAT, "state": state_of(shapes=[["a", [-2, 40]]])}),
    "shape no numbers": (WORDS, {"format": FORMAT, "state": state_of(shapes=[["a", ["2", 40]]])}),
    "names differ": (WORDS, {"format": FORMAT, "state": state_of(shapes=[["b", [2, 40]]])}),
    "no words": ({}, {"format": FORMAT, "state": state_of()}),
    "words of floats": ({"a": torch.ones(2, 2)}, {"format": FORMAT, "state": state_of()}),
    "bits behind the end": ({"a": torch.full((2, 2), -1).int()}, {"format": FORMAT, "state": state_of()}),
    "keep no number": (WORDS, {"format": FORMAT, "state": state_of(keep=[])}),
    "keep not finite": (WORDS, {"format": FORMAT, "state": state_of(keep=float("nan"))}),
    "keep below 0": (WORDS, {"format": FORMAT, "state": state_of(keep=-1)}),
    "keep above 1": (WORDS, {"format": FORMAT, "state": state_of(keep=1.5)}),
    "gamma 0": (WORDS, {"format": FORMAT, "state": state_of(gamma=0)}),
    "gamma not finite": (WORDS, {"format": FORMAT, "state": state_of(gamma=float("inf"))}),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name, tmp_path):
    path = tmp_path / "mask.safetensors"
    write_sealed(path, *HOSTILE[name])
    with pytest.raises(ValueError, match="mask.safetensors: not a weight mask: (?!damaged)"):
        WeightMask.load(path)


@pytest.mark.quick
def test_the_hostile_files_would_be_whole_otherwise(tmp_path):
    path = tmp_path / "mask.safetensors"
    write_sealed(path, WORDS, {"format": FORMAT, "state": state_of()})
    assert WeightMask.load(path).kept("a").sum() == 4


@pytest.mark.quick
@pytest.mark.parametrize("content", [b"", b"short", struct.pack("<Q", 2**62) + b"{}", b"\0" * 100])
def test_broken_files_are_refused(content, tmp_path):
    path = tmp_path / "mask.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a weight mask"):
        WeightMask.load(path)
    with pytest.raises(ValueError, match="absent.safetensors: not a weight mask"):
        WeightMask.load(tmp_path / "absent.safetensors")


@pytest.mark.quick
def test_a_mask_from_another_model_names_the_first_difference(model):
    mask = weight_mask(model, *data(), keep=0.5, gamma=1.0)
    with pytest.raises(ValueError, match=r"embed_tokens.weight is \[64, 32\] in the mask and \[70, 32\] in Olmoe"):
        mask.check(tiny_olmoe(vocab_size=70))
    smaller = Line(3)
    with pytest.raises(ValueError, match=r"weights\.0 is absent in the mask"):
        mask.check(smaller)
    only = WeightMask({"x": (1,)}, {"x": torch.zeros(1, dtype=torch.int32)}, 0.5)
    with pytest.raises(ValueError, match="x is .* in the mask and absent in Module"):
        only.check(nn.Module())


@pytest.mark.quick
def test_scores_that_are_not_finite_name_the_parameter(model):
    forget, retain = data()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.inf
    with pytest.raises(ValueError, match=r"the WAGLE score of model\.\S+ is not finite in \d+ of \d+ places"):
        weight_mask(model, forget, retain, keep=0.5, gamma=1.0)
    line = Line(3, 2)
    with pytest.raises(ValueError, match=r"score of weights\.1 is not finite in 1 of 2 places"):
        line_mask(line, ([1.0] * 3, [1.0, torch.nan]), ([1.0] * 3, [1.0] * 2), keep=0.5, gamma=1.0)


@pytest.mark.quick
@pytest.mark.parametrize("keep", [0.0, -0.1, 1.1, float("nan")])
def test_bad_keep(model, keep):
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\]"):
        weight_mask(model, *data(), keep=keep, gamma=1.0)


@pytest.mark.quick
def test_other_bad_input_is_named(model):
    forget, retain = data()
    ignored = [dict(b, labels=torch.full_like(b["labels"], -100)) for b in retain]
    with pytest.raises(ValueError, match="gamma must be above 0; got 0"):
        weight_mask(model, forget, retain, keep=0.5, gamma=0.0)
    with pytest.raises(ValueError, match="the retain set carries no loss"):
        weight_mask(model, forget, ignored, keep=0.5, gamma=1.0)
    with pytest.raises(ValueError, match="the forget set carries no loss"):
        weight_mask(model, [], retain, keep=0.5, gamma=1.0)
