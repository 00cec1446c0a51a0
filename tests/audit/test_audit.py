"""Planted models are caught by the attack meant for them, and a model that never saw the documents passes."""

import copy
import dataclasses
import sys

import pytest
import torch

from moe_unlearn.audit import ATTACKS, Settings, audit, plain
from moe_unlearn.audit.attack import reading
from moe_unlearn.audit.rounding import survives
from moe_unlearn.audit.weights import restored
from moe_unlearn.benchmark.tiny_models import tiny_olmoe
from moe_unlearn.metrics import token_scores
from moe_unlearn.model.grids import GRIDS, NF4, linear_weights
from tests.support.forked_ranks import found_on
from tests.support.planted import less_likely, on_the_grid, quantisable, rerouted, suppressed

FAST = Settings(new_tokens=16, relearn_steps=8, samples=2, experts=3)


def found(report, attack, variant, score="loglik"):
    """The one finding of an attack, a variant and a score."""
    [own] = [f for f in report.findings if (f.attack, f.variant, f.score) == (attack, variant, score)]
    return own


def made(model, experiment, rows, before, **more):
    options = {"say": lambda line: None, "resamples": 1999, "settings": FAST} | more
    return audit(model, experiment.tokenizer, before=before, **rows, **options)


@pytest.mark.nightly
def test_a_model_that_never_saw_the_documents_passes_every_attack(experiment, rows):
    """By day test_attacks.py has those that are cheap, on several document sets."""
    report = made(experiment.retrain, experiment, rows, experiment.target)
    assert {report.of(name) for name in ATTACKS} <= {"gone", "undecided", ""} and report.of("rounding")
    assert list(report.outcomes) == list(ATTACKS) and not report.not_tested
    assert report.told_apart.low <= 0
    assert found(report, "inside", "lens", "lens").verdict == "" == found(report, "inside", "probe", "probe").verdict


def test_a_model_like_the_retrained_one_is_gone(experiment, rows):
    attacks = ["plain", "inside"]
    report = made(
        experiment.retrain, experiment, rows, experiment.target, reference=experiment.retrain, attacks=attacks
    )
    assert report.verdict == "gone" and report.reference
    assert {report.of(name) for name in attacks} == {"gone"}


def test_a_model_that_forgot_nothing_is_seen(experiment, rows):
    report = made(experiment.target, experiment, rows, experiment.target, attacks=["plain"])
    assert report.verdict == report.of("plain") == "present"
    by_score = {f.score: f for f in report.findings}
    for score in ("loglik", "recall", "verbmem", "knowmem", "loss", "min_k", "min_k_plus_plus", "zlib"):
        assert by_score[score].verdict == "present" and by_score[score].share == pytest.approx(1)


def test_what_rounding_brings_back(experiment, rows):
    before = on_the_grid(experiment.target)
    after = quantisable(before, experiment.forget)
    report = made(after, experiment, rows, before, attacks=["rounding"])
    asked, int8, int4 = (
        found(report, *where) for where in (("plain", "as it is"), ("rounding", "int8"), ("rounding", "int4"))
    )
    assert asked.share < 0.5 and int8.share < 0.5 and int4.share == pytest.approx(1)
    assert int4.verdict in ("hidden", "present")
    survive = {grid: own["survive"] for grid, own in report.outcomes["rounding"].more["survives"].items()}
    assert survive["int4"] == 0 and survive["int8"] > 0.5


def test_a_truth_that_is_merely_less_likely_is_there(experiment, rows):
    after = less_likely(experiment.target, experiment.forget)
    report = made(after, experiment, rows, experiment.target, attacks=["plain"])
    by_score = {f.score: f for f in report.findings}
    assert by_score["verbmem"].verdict == "gone" and by_score["recall"].share < 0.1
    assert by_score["loglik"].verdict == "present" and by_score["min_k"].verdict == "present"


def test_what_former_routers_bring_back(experiment, rows):
    after = rerouted(experiment.target, experiment.forget)
    report = made(after, experiment, rows, experiment.target, attacks=["routing"])
    asked, back, forced, more = (
        found(report, *where)
        for where in (
            ("plain", "as it is"),
            *(("routing", name) for name in ("router back", "routes forced", "top-k +1")),
        )
    )
    assert asked.share < 0.6 and more.share < 0.6
    assert back.share == pytest.approx(1) and back.verdict in ("hidden", "present")
    assert 0.6 < forced.share < 1 and forced.verdict in ("hidden", "present")
    # the experts are as they were: nothing is found in any of them
    recovered = [value for row in report.outcomes["routing"].more["recovered"] for value in row if value is not None]
    assert len(recovered) == FAST.experts and max(map(abs, recovered)) < 1e-6


def test_where_the_knowledge_was(experiment, rows):
    """The former self of the one expert that was changed brings back what that change took, and no other does."""
    after = copy.deepcopy(experiment.target)
    with torch.no_grad():
        after.model.layers[1].mlp.experts.down_proj[2].zero_()
    rows = {side: own[:8] for side, own in rows.items()}
    settings = dataclasses.replace(FAST, experts=64)
    report = made(after, experiment, rows, experiment.target, attacks=["routing"], settings=settings)
    table = report.outcomes["routing"].more["recovered"]
    assert len(table) == 2 and all(len(row) == 8 for row in table)
    values = {(i, j): value for i, row in enumerate(table) for j, value in enumerate(row) if value is not None}
    assert values.pop((1, 2)) > 0.01 and max(map(abs, values.values())) < 1e-6
    together = report.outcomes["routing"].variants["all experts back"]
    known = reading(token_scores(experiment.target, rows["forget"], batch_size=8))["loglik"]
    assert together.scores["loglik"]["forget"] == pytest.approx(known, abs=1e-5) and not together.judged


def test_what_the_former_head_reads(experiment, rows):
    """A head that was taught to keep silent leaves the states as they were."""
    after = suppressed(experiment.target, experiment.forget, strength=6.0)
    assert not torch.equal(after.lm_head.weight, experiment.target.lm_head.weight)
    report = made(after, experiment, rows, experiment.target, reference=experiment.retrain, attacks=["inside"])
    asked, lens = found(report, "plain", "as it is"), found(report, "inside", "lens", "lens")
    assert asked.share < 0.1 and lens.share == pytest.approx(1, abs=0.02)
    assert lens.verdict in ("hidden", "present")
    assert found(report, "inside", "probe", "probe").share is not None


def test_models_are_left_bit_for_bit(experiment, rows):
    after = copy.deepcopy(experiment.target)
    with torch.no_grad():
        after.model.layers[0].mlp.experts.down_proj.mul_(0.9)
    after.train()
    after.lm_head.weight.requires_grad_(False)
    models = {"after": after, "before": experiment.target}
    rows = {side: own[:8] for side, own in rows.items()}
    kept = {name: {k: v.clone() for k, v in model.state_dict().items()} for name, model in models.items()}
    state = torch.get_rng_state()
    settings = dataclasses.replace(FAST, relearn_steps=2, experts=1, samples=1)
    report = made(after, experiment, rows, experiment.target, settings=settings)
    assert list(report.outcomes) == list(ATTACKS)
    for name, model in models.items():
        assert all(torch.equal(v, kept[name][k]) for k, v in model.state_dict().items()), name
        assert all(p.grad is None for p in model.parameters())
    assert after.training and torch.equal(torch.get_rng_state(), state) and not after.lm_head.weight.requires_grad


def test_weights_are_restored_whatever_happens():
    weight = torch.tensor([1.0, float("nan"), -0.0])
    bits = weight.view(torch.int32).clone()
    with pytest.raises(RuntimeError), restored([weight, weight]):
        weight.zero_()
        raise RuntimeError
    assert torch.equal(weight.view(torch.int32), bits)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_rounding_is_to_the_nearest_of_the_grid(grid):
    weight = torch.randn(3, 40, 200)  # a group that is not full
    for inputs in (1, 2):
        rounded = grid.rounded(weight, inputs).movedim(inputs, -1)
        values = weight.movedim(inputs, -1)
        size = min(grid.group or values.shape[-1], values.shape[-1])
        for part, own in zip(values.split(size, -1), rounded.split(size, -1), strict=True):
            largest = part.abs().amax(-1, keepdim=True)
            steps = torch.arange(-grid.largest, grid.largest + 1) / grid.largest if grid.largest else None
            if steps is None:
                steps = torch.tensor(NF4)
            nearest = (part[..., None] / largest[..., None] - steps).abs().amin(-1) * largest
            assert torch.allclose((part - own).abs(), nearest, atol=1e-6)
    assert torch.equal(grid.rounded(torch.zeros(2, 4), 1), torch.zeros(2, 4))


def test_what_survives_is_counted():
    former = torch.randn(8, 16)
    weight = former.clone()
    weight[0, :4] += 1e-4
    weight[1, :3] += 0.5 * former.abs().max() * torch.sign(former[1, :3])
    changed, kept = survives(GRIDS[1], weight, former, 1)
    assert changed == 7 and 0 < kept < 7
    assert survives(GRIDS[1], former, former, 1) == (0, 0)


def test_what_is_rounded(experiment):
    names = set(linear_weights(experiment.target))
    assert not any("gate.weight" in name or "lm_head" in name or "norm" in name for name in names)
    assert any(name.endswith("experts.gate_up_proj") for name in names) and any("q_proj" in name for name in names)


def test_results_are_kept_by_their_content(experiment, rows, tmp_path, monkeypatch):
    few = {side: own[:8] for side, own in rows.items()}
    kept = {"attacks": ["plain"], "cache_dir": tmp_path}
    first = made(experiment.retrain, experiment, few, experiment.target, **kept)
    ran = []
    # the package's attribute of the same name as the package is the function
    monkeypatch.setattr(sys.modules["moe_unlearn.audit.run"], "ATTACKS", {"plain": counted(plain.ATTACK, ran)})
    again = made(experiment.retrain, experiment, few, experiment.target, **kept)
    assert not ran and again.findings == first.findings
    made(experiment.retrain, experiment, few, experiment.target, **kept, settings=Settings(seed=1))
    other = copy.deepcopy(experiment.retrain)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    made(other, experiment, few, experiment.target, **kept)
    assert len(ran) == 2


def counted(attack, ran):
    def run(target):
        ran.append(attack.name)
        return attack.run(target)

    return dataclasses.replace(attack, run=run)


def test_what_there_was_no_time_for_is_listed(experiment, rows):
    rows = {side: own[:8] for side, own in rows.items()}
    asked = ["plain", "rounding"]
    report = made(experiment.retrain, experiment, rows, experiment.target, attacks=asked, minutes=1e-9)
    assert list(report.outcomes) == ["plain"]
    assert report.not_tested["rounding"] == "the budget of 1e-09 minutes was used up"
    assert report.not_tested["interpolation"] == "it was not asked for"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attacks": ["guess"]}, "expected attacks among plain, .*; got 'guess'"),
        ({"minutes": 0.0}, "budget above 0"),
        ({"forget": ["x"] * 0}, "forget: expected documents to audit with; got none"),
        ({"holdout": "forget"}, "holdout: expected documents to audit with; got 40 holdout rows were trained on"),
    ],
)
def test_bad_input_is_refused_before_any_work(change, message, experiment, rows):
    if change.get("holdout") == "forget":
        change = {"holdout": rows["forget"]}
    with pytest.raises(ValueError, match=message):
        made(None, experiment, rows | change, None)


def test_a_model_before_of_another_kind_is_refused(experiment, rows):
    with pytest.raises(ValueError, match="of one architecture and dtype; .* is .* in one and"):
        made(experiment.retrain, experiment, rows, tiny_olmoe(300), attacks=["plain"])


def test_texts_that_differ_take_the_verdict_from_membership(experiment, rows):
    other = [dataclasses.replace(e, input_ids=e.input_ids[:8], labels=e.labels[:8]) for e in rows["holdout"]]
    report = made(experiment.retrain, experiment, rows | {"holdout": other}, experiment.target, attacks=["plain"])
    assert report.told_apart.low > 0
    by_score = {f.score: f for f in report.findings}
    assert by_score["min_k"].verdict == "" and "give --reference" in by_score["min_k"].why


@pytest.mark.nightly
@pytest.mark.slow
def test_two_ranks_find_what_one_process_finds(experiment, rows, tmp_path):
    few = {side: own[:10] for side, own in rows.items()}

    def act(rank):
        report = made(experiment.retrain, experiment, few, experiment.target, cache_dir=tmp_path / "cache")
        return report.to_dict() | {"seconds": None}

    first, second = found_on(2, tmp_path, act)
    alone = made(experiment.retrain, experiment, few, experiment.target).to_dict()
    assert first == second
    assert [own["verdict"] for own in first["findings"]] == [own["verdict"] for own in alone["findings"]]
    shares = ([own["share"] or 0.0 for own in found["findings"]] for found in (first, alone))
    assert next(shares) == pytest.approx(next(shares), abs=1e-3)
    assert len(list((tmp_path / "cache").iterdir())) == len(ATTACKS) + 2  # one a result, of one rank
