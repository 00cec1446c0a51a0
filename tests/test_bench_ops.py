"""Every op's cases at toy size: whoever is held against ours computes the same, and whoever is missing is named."""

import pytest
import torch

from benchmarks import (
    bench_expert_layer,
    bench_expert_mlp,
    bench_expert_wgrad,
    bench_gram,
    bench_masked_update,
    bench_retain_weights,
    bench_route,
    bench_token_loss,
    bench_weight_score,
    harness,
    mask_groups,
    rivals,
    shapes,
    step_short,
    suite,
)
from benchmarks.harness import OURS
from benchmarks.layers import Layer
from benchmarks.shapes import Geometry

TOY = Geometry("toy", 64, 32, 8, 2, 100)
TOY_GPT_OSS = Geometry("toy gpt-oss", 64, 32, 8, 2, 100, gpt_oss=True)


def alike(a, b):
    """Two results of one computation in bfloat16."""
    a, b = a.detach().double().flatten(), b.detach().double().flatten()
    return bool((a - b).norm() < 0.02 * b.norm() + 1e-6)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_titles_are_unique_and_every_case_names_ours_first(device):
    cases = suite.cases(device)
    assert len({case.title for case in cases}) == len(cases) > 40
    assert all(case.names[0].startswith(OURS) for case in cases)
    assert [case.tier for case in cases] == sorted(case.tier for case in cases)
    assert {case.op for case in cases} == {*suite.OPS, "step"}


def test_what_targets_depend_on_fits_in_the_time():
    for device, seconds in suite.SECONDS.items():
        assert sum(case.seconds for case in suite.cases(device) if case.tier == 0) < 0.8 * seconds
    assert sum(case.seconds for case in suite.cases("cpu")) < suite.SECONDS["cpu"]


@pytest.mark.parametrize("geometry", [TOY, TOY_GPT_OSS], ids=lambda g: g.name)
@pytest.mark.parametrize("routing", list(shapes.ROUTINGS))
def test_peers_compute_the_same_layer(geometry, routing):
    layer = Layer(geometry, 48, routing=routing)
    found, missing = rivals.collected(rivals.EXPERTS, layer)
    assert {"transformers grouped_mm", "transformers eager"} <= found.keys()
    assert found.keys() | missing.keys() == rivals.EXPERTS.keys()
    ours = layer.ours(layer.hidden, layer.index, layer.weights)
    for name, function in found.items():
        assert alike(ours, function(layer.hidden, layer.index, layer.weights)), name


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_expert_mlp(direction):
    work = bench_expert_mlp.work(TOY, 48, "uniform", direction, "cpu")
    results = {name: function() for name, function in work.contenders.items()}
    for name, result in results.items():
        pairs = zip(*((r if isinstance(r, tuple) else (r,)) for r in (results[OURS], result)), strict=True)
        assert all(alike(a, b) for a, b in pairs), name
    assert work.missing["liger fused_moe"] == "its kernels need a GPU"


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_the_layer_s_contenders_make_the_same_update(share):
    moved = {}
    for name in bench_expert_layer.NAMES[:4]:
        layer = Layer(TOY, 48, share=share)
        before = [p.detach().clone() for p in layer.parameters()]
        grouped = rivals.EXPERTS[bench_expert_layer.GROUPED](layer)
        make = {
            OURS: lambda layer, _: bench_expert_layer.ours(layer),
            bench_expert_layer.DENSE: lambda layer, g: bench_expert_layer.dense(layer, g, fused=None),
            bench_expert_layer.FUSED: lambda layer, g: bench_expert_layer.dense(layer, g, fused=True),
            bench_expert_layer.FAIR: bench_expert_layer.compact,
        }[name]
        make(layer, grouped)()
        moved[name] = torch.cat([(p.detach() - b).flatten() for p, b in zip(layer.parameters(), before, strict=True)])
        frozen = torch.ones(TOY.experts, dtype=torch.bool).index_fill_(0, layer.trained, False)
        assert all(torch.equal(p.detach()[frozen], b[frozen]) for p, b in zip(layer.parameters(), before, strict=True))
    # the first step of AdamW is a sign where a gradient is not tiny: few of them may differ
    for name, other in moved.items():
        assert torch.cosine_similarity(moved[OURS].double(), other.double(), dim=0) > 0.99, name


def test_expert_wgrad():
    work = bench_expert_wgrad.work(TOY, 48, 0.5, "cpu")
    for function in work.contenders.values():
        function()
    assert work.contenders.keys() == {OURS, bench_expert_wgrad.DENSE, bench_expert_wgrad.COMPACT}


@pytest.mark.parametrize("dtype,trained", [("bfloat16", False), ("float32", True)])
def test_token_loss(dtype, trained):
    work = bench_token_loss.work(32, 16, 60, dtype, trained, "cpu")
    losses = {name: float(function()) for name, function in work.contenders.items()}
    assert set(losses) | set(work.missing) == {OURS, *rivals.LOSSES}
    assert all(value == pytest.approx(losses[OURS], rel=0.02) for value in losses.values()), losses


def test_masked_update(monkeypatch):
    monkeypatch.setitem(bench_masked_update.SHAPES, "cpu", (2, 40, 64))
    for case in bench_masked_update.cases("cpu"):
        for function in harness.built(case).contenders.values():
            function()


def test_weight_score_chooses_the_same_weights(monkeypatch):
    monkeypatch.setitem(bench_weight_score.SHAPES, "cpu", (2, 16, 64))
    work = bench_weight_score.threshold("float32", "cpu")
    assert work.found["elements_chosen_differently"] == 0
    own = work.contenders[bench_weight_score.KTHVALUE]()
    assert sum(int(mask.sum()) for mask in own) == round(0.8 * 4 * 2 * 16 * 64)


def test_all_of_a_masks_work_finds_one_mask_at_once_and_in_groups(monkeypatch):
    monkeypatch.setitem(bench_weight_score.SHAPES, "cpu", (2, 40, 320))
    work = bench_weight_score.whole("bfloat16")
    assert work.found["sample"] > 256 and list(work.contenders)[1] == "ours, 4 groups"


def test_a_mask_in_groups_is_the_one_that_sorting_finds(monkeypatch):
    small = {"hidden_size": 32, "intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 64}
    monkeypatch.setattr(mask_groups, "GEOMETRY", mask_groups.GEOMETRY | small)
    monkeypatch.setattr(mask_groups, "TOKENS", 32)
    work = mask_groups.work()
    assert work.found["elements_chosen_differently"] < 20  # ties: the sort is not stable
    assert all(passes > 2 for passes in work.found["passes_over_both_sets"].values())
    packed = [work.contenders[name]().packed for name in (OURS, *map(mask_groups.in_groups, mask_groups.SHARES))]
    assert all(torch.equal(words, packed[0][name]) for other in packed for name, words in other.items())


def test_route_retain_weights_and_gram(monkeypatch):
    monkeypatch.setattr(bench_retain_weights, "TOKENS", 256)
    monkeypatch.setitem(bench_gram.SHAPES, "cpu", [(2, 8, 16)])
    order, counts, offsets = bench_route.work(64, 8, 2, "cpu").contenders[bench_route.TORCH]()
    ours = bench_route.work(64, 8, 2, "cpu").contenders[OURS]()
    assert torch.equal(ours.sorted_rows, order.int()) and torch.equal(ours.tokens_per_expert, counts.int())
    assert torch.equal(ours.expert_offsets, offsets.int())
    weights = bench_retain_weights.work("weights", 32, "cpu").contenders
    assert alike(weights[OURS](), weights[bench_retain_weights.DENSE]())
    work = bench_gram.sets_work(3, "float32", "cpu", True)
    assert alike(work.contenders[OURS](), work.contenders[bench_gram.PRODUCT]())
    assert bench_gram.sets_work(2, "float32", "cpu", False).found["largest_relative_error"][OURS] < 1e-5
    factors = bench_gram.factors_work(2, "float32", "cpu").contenders
    assert alike(factors[OURS](), factors[bench_gram.DENSE]())


def test_implementations_of_ours_are_measured_side_by_side(monkeypatch):
    """CUDA and Triton on a GPU; one that is not there is a line that says why."""
    monkeypatch.setitem(harness.SIDES, "cpu", ("cpu", "ref", "cuda"))
    monkeypatch.setitem(bench_masked_update.SHAPES, "cpu", (2, 40, 64))
    monkeypatch.setitem(bench_weight_score.SHAPES, "cpu", (2, 16, 64))
    monkeypatch.setattr(bench_retain_weights, "TOKENS", 256)
    both, seen = ("ours, cpu", "ours, ref"), set()
    made = [bench_route.work(64, 8, 2, "cpu"), bench_expert_wgrad.work(TOY, 48, 0.5, "cpu")]
    made.append(bench_expert_wgrad.store_work(TOY, 48, 0.5, "cpu"))
    made += [harness.built(case) for case in bench_masked_update.cases("cpu")[:6]]
    made += [bench_retain_weights.work(part, 32, "cpu") for part in bench_retain_weights.PARTS]
    made += [bench_weight_score.piece(part, "float32", "cpu") for part in bench_weight_score.PARTS]
    made += [bench_weight_score.threshold("float32", "cpu")]
    for work in made:
        assert set(both) <= work.contenders.keys() and work.missing["ours, cuda"], work
        results = [work.contenders[name]() for name in both]
        if isinstance(results[0], torch.Tensor):
            assert alike(*results)
        seen.add(work.found["choice"][0] if "choice" in work.found else "")
    parts = {
        "route",
        "expert_wgrad",
        "expert_wgrad.adamw",
        "retain_weights",
        "retain_weights.moments",
        "masked_update.sgd",
        "masked_update.adamw",
        "weight_score.histogram",
        "weight_score.mask",
        "",
    }
    assert seen == parts


def test_the_step_s_rows_have_the_suite_s_form():
    (first, *_) = step_short.cases("cpu", toy=True)
    row = harness.run(first, "cpu", {})
    assert row["op"] == "step" and first.title == f"step: {row['name']}" and row["missing"] == {}
    assert any(v["what"] == "ours: speed-up over dense" for v in row["verdicts"])
    assert "speed-up over dense" in suite.line(row)
    short = [case for case in step_short.cases("cpu") if case.tier == 0]
    assert len(short) == 3 and all({"ours", "dense"} <= set(case.names) for case in short)


def test_a_missing_library_is_a_line(monkeypatch):
    with pytest.raises(rivals.Missing, match=r"not installed \(no-such-thing\)"):
        rivals.module("no_such_thing", "no-such-thing")
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    _, missing = rivals.collected(rivals.LOSSES)
    assert "has no F.linear_cross_entropy" in missing["torch F.linear_cross_entropy"]
