"""The study: what is planned, resumed and matched, and that controls change the one thing they are about."""

import json
import math
from dataclasses import replace

import pytest
import torch

from benchmarks import study, study_report, study_run
from benchmarks.study import SCALES, Entry, Scale
from benchmarks.study_run import Spec
from moe_unlearn import data, trace
from moe_unlearn.benchmark.tiny_models import SIZES
from moe_unlearn.config import Recipe
from moe_unlearn.model.batches import target_mask
from moe_unlearn.step import UnlearnStep

TOY = replace(SIZES["test"], forget=12, unlearn_share=0.5)
SPEC = Spec(
    settings=TOY,
    corpus="builtin:pydoc",
    seed=3,
    recipe="graddiff",
    overrides=("optimizer.lr=1e-3",),
    max_steps=24,
    check_every=4,
)


@pytest.fixture(scope="module")
def made():
    return study_run._prepared(SPEC.models)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Models, a plain run and one with TRACE."""
    folder = tmp_path_factory.mktemp("parts")
    for spec in (SPEC.models, SPEC, traced(SPEC)):
        study.execute(folder, spec)
    return folder


def traced(spec, control=""):
    return replace(spec, overrides=(*spec.overrides, *study.TRACE, "trace.min_ratio=1.05"), control=control)


@pytest.mark.quick
@pytest.mark.parametrize("name", SCALES)
def test_every_planned_run_has_a_recipe_that_loads(name):
    found = study.entries(SCALES[name])
    assert {e.group for e in found} == {"main", "mismatch", "ablation"}
    for overrides in {(e.spec.recipe, e.spec.overrides) for e in found}:
        Recipe.load(*overrides)
    variants = {e.baseline: set() for e in found if e.group == "main"}
    for e in found:
        if e.group == "main":
            variants[e.baseline].add(e.variant)
    everything = {"plain", "TRACE", "WAGLE", "MOLLM", "all three"}
    assert variants.pop("RMU") == {"plain", "WAGLE", "MOLLM"}
    assert all(v == everything for v in variants.values()) and len(variants) == 6


@pytest.mark.quick
def test_the_whole_study_has_five_seeds_and_the_tuning_seed_is_in_neither():
    for scale in SCALES.values():
        assert 0 not in scale.seeds and scale.settings.layers >= 3 and 16 <= scale.settings.experts <= 32
    assert len(SCALES["whole"].seeds) >= 5


def test_a_key_changes_with_everything_that_makes_the_result(monkeypatch):
    others = [
        replace(SPEC, seed=4),
        replace(SPEC, control="random-mask"),
        replace(SPEC, overrides=()),
        replace(SPEC, settings=replace(TOY, experts=16)),
        replace(SPEC, retain="seldom"),
        replace(SPEC, recipe=None),
    ]
    assert len({s.key for s in [SPEC, *others]}) == 7 and replace(SPEC).key == SPEC.key
    before = SPEC.key
    for name, value in (("VERSION", 0), ("_shipped", lambda name: {"name": "graddiff, changed"})):
        with monkeypatch.context() as patch:
            patch.setattr(study_run, name, value)
            assert SPEC.key != before
    assert SPEC.key == before


def test_numbers_are_interpolated_where_forgetting_crosses_the_retrained_model(parts):
    models, result = study.load(parts, SPEC.models), study.load(parts, SPEC)
    assert models["models"]["target"]["verbmem_f"] > 0.9 > 0.5 > models["models"]["retrain"]["verbmem_f"]
    level = models["models"]["retrain"]["verbmem_f"]
    matched, (*_, before, last) = result["matched"]["retrain"], result["trajectory"]
    assert last["verbmem_f"] <= level < before["verbmem_f"]
    assert matched["verbmem_f"] == pytest.approx(level)
    share = (before["verbmem_f"] - level) / (before["verbmem_f"] - last["verbmem_f"])
    assert matched["step"] == pytest.approx(before["step"] + 4 * share)
    assert result["matched"]["near"]["verbmem_f"] == pytest.approx(level + study_run.NEAR)
    # at full share the end of the run, whose other numbers lie on the same line
    end = result["end"]
    assert end["verbmem_f"] == pytest.approx(last["verbmem_f"])
    assert min(1.0, end["nll_r"]) > 0 and matched["nll_f"] < end["nll_f"]


def test_a_run_that_does_not_cross_says_so(made, parts):
    slow = replace(SPEC, overrides=("optimizer.lr=1e-6",), max_steps=4)
    result = study_run.run(slow, study.load(parts, SPEC.models))
    assert result["matched"] == {"near": None, "retrain": None} and len(result["trajectory"]) == 2


def test_expert_gradients_equal_autograd_on_one_batch_and_follow_the_weights(made):
    batch = data.batches(made.retain_unlearn, 64)
    norms = study_run.expert_gradients(made.target, batch)
    loss = made.target(**{k: v for k, v in batch[0].items() if k != "index"}, use_cache=False).loss
    experts = made.target.model.layers[1].mlp.experts
    gradients = torch.autograd.grad(loss, list(experts.parameters()))
    expected = sum(g.flatten(1).square().sum(1) for g in gradients).sqrt()
    torch.testing.assert_close(norms[1].float(), expected, rtol=1e-3, atol=1e-6)
    count = int(target_mask(batch[0]).sum())
    torch.testing.assert_close(study_run.expert_gradients(made.target, batch, torch.full((count,), 2.0)), 2 * norms)
    small = study_run.expert_gradients(made.target, data.batches(made.retain_unlearn, 3))
    torch.testing.assert_close(small, norms, rtol=1e-3, atol=1e-7)


def prepared(made, spec):
    recipe = Recipe.load(spec.recipe, spec.overrides)
    step, retain = UnlearnStep(made.fresh_target(), recipe), data.batches(made.retain_unlearn, 8)
    with study_run.control(spec):
        step.prepare(data.batches(made.forget, 8), retain)
        study_run._change_weights(spec, step, retain)
    weights = [step.prepared.token_weights.get(b) for b in retain] if step.prepared.token_weights else []
    return step.prepared, weights, [target_mask(b) for b in retain]


def test_controls_of_trace_keep_what_they_do_not_replace(made):
    base, weights, masks = prepared(made, traced(SPEC))
    flat = torch.cat([w[m] for w, m in zip(weights, masks, strict=True)])
    _, shuffled, _ = prepared(made, traced(SPEC, "shuffled-tokens"))
    moved = torch.cat([w[m] for w, m in zip(shuffled, masks, strict=True)])
    assert not torch.equal(moved, flat) and torch.equal(moved.sort().values, flat.sort().values)
    _, sequences, _ = prepared(made, traced(SPEC, "sequence-weights"))
    for w, s, m in zip(weights, sequences, masks, strict=True):
        for row, same, mask in zip(w, s, m, strict=True):
            assert torch.allclose(same[mask], row[mask].mean()) and not same[~mask].any()
    other, drawn, _ = prepared(made, traced(SPEC, "random-experts"))
    assert torch.equal(other.selected.sum(1), base.selected.sum(1)) and not torch.equal(other.selected, base.selected)
    total = sum(float(w[m].sum()) for w, m in zip(drawn, masks, strict=True))
    assert total == pytest.approx(sum(int(m.sum()) for m in masks), rel=1e-3)


@pytest.mark.parametrize("name", ["random-mask", "magnitude-mask"])
def test_control_masks_keep_the_fraction_asked_for(made, name):
    spec = replace(SPEC, overrides=("wagle.keep=0.3",), control=name)
    mask = prepared(made, spec)[0].mask
    assert mask.fraction == pytest.approx(0.3, abs=1e-3)
    again = prepared(made, spec)[0].mask
    assert all(torch.equal(mask.words(n), again.words(n)) for n in mask.names)
    if name == "magnitude-mask":
        weight = made.target.model.layers[0].mlp.experts.down_proj.detach().abs()
        kept = mask.kept("model.layers.0.mlp.experts.down_proj")
        assert weight[kept].min() > weight[~kept].max()


def test_equal_lambda_is_equal_and_only_inside(made):
    spec = replace(SPEC, overrides=("forget.objective=uce", "mollm={kl: false, normalize: none}"))
    found = {}
    for name in ("equal-lambda", ""):
        step = UnlearnStep(made.fresh_target(), Recipe.load(spec.recipe, spec.overrides))
        with study_run.control(replace(spec, control=name)):
            forget, retain = data.batches(made.forget, 8), data.batches(made.retain_unlearn, 8)
            step.prepare(forget, retain)
            found[name] = step(forget[0], retain[0])
    assert found["equal-lambda"]["lambda_forget"] == found["equal-lambda"]["lambda_retain"] == 0.5
    assert found[""]["lambda_forget"] != 0.5


def test_an_unknown_control_is_refused(made):
    with pytest.raises(ValueError, match="unknown control 'x'; expected one of random-experts"):
        prepared(made, replace(SPEC, control="x"))


def test_seldom_shows_unlearning_the_documents_that_use_critical_experts_least(made):
    few = study_run._prepared(replace(SPEC.models, retain="seldom"))
    study_run._prepared(SPEC.models)  # back in the cache of one for the tests that follow
    assert len(few.retain_unlearn) == len(made.retain_unlearn)
    assert {tuple(e.input_ids) for e in few.retain} == {tuple(e.input_ids) for e in made.retain}
    selected = study_run._critical(made.target, made.forget, made.retain)

    def use(examples):
        return trace.routing_frequencies(made.target, data.batches(examples, 8)).frequency[selected].mean()

    assert not selected.any() or use(few.retain_unlearn) < use(few.retain_eval)


def test_what_is_there_is_not_made_again_and_half_a_part_is(parts, monkeypatch):
    made_now = []
    monkeypatch.setattr(study, "run", lambda spec, models: made_now.append(spec) or {"seconds": 0.0})
    assert study.load(parts, SPEC) is not None and study.load(parts, replace(SPEC, seed=9)) is None
    lines = []
    assert study.make(parts, [SPEC, traced(SPEC)], 1, lines.append) == [] and lines == []
    broken = study.part(parts, replace(SPEC, seed=9))
    broken.write_text("{", encoding="utf-8")
    assert study.load(parts, replace(SPEC, seed=9)) is None
    study.execute(parts, replace(SPEC, seed=9))
    assert len(made_now) == 1 and study.load(parts, replace(SPEC, seed=9)) == {"seconds": 0.0}
    study.part(parts, replace(SPEC, seed=9)).unlink()


def test_one_failed_run_is_named_and_stops_no_other(tmp_path, monkeypatch):
    def fails(spec, models):
        if spec.control:
            raise RuntimeError("no such thing")
        return {"seconds": 1.0}

    monkeypatch.setattr(study, "run", fails)
    lines = []
    specs = [replace(SPEC, control="x"), SPEC, replace(SPEC, seed=4)]
    (failure,) = study.make(tmp_path, specs, 1, lines.append)
    assert failure.startswith("FAILED pydoc-seed3-graddiff") and failure.endswith("x: no such thing")
    assert len(lines) == 5 and all(study.load(tmp_path, s) for s in (SPEC, SPEC.models, specs[2]))


def test_intervals_are_students_and_paired():
    found = study_report.paired([1.0, 2.0, 3.0])
    assert found == {"mean": 2.0, "half": pytest.approx(4.302652729911275 / math.sqrt(3)), "n": 3}
    assert study_report.paired([5.0])["half"] is None and study_report.paired([]) == {
        "mean": None,
        "half": None,
        "n": 0,
    }


def test_the_report_counts_what_did_not_reach_and_pairs_by_seed(parts, tmp_path):
    entries = [
        Entry(group, "builtin:pydoc", "GradDiff", variant, spec)
        for group in ("main", "mismatch")
        for variant, spec in (("plain", SPEC), ("TRACE", traced(SPEC)), ("WAGLE", replace(SPEC, control="none")))
    ]
    text = study_report.write(tmp_path, entries, parts, "small")
    content = json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))
    plain, with_trace = content["main"]
    ours, theirs = (study.load(parts, s)["matched"]["retrain"]["verbmem_r"] for s in (traced(SPEC), SPEC))
    assert with_trace["difference"]["verbmem_r"] == {"mean": pytest.approx(ours - theirs), "half": None, "n": 1}
    assert with_trace["against_strongest"]["mean"] == pytest.approx(100 * (ours / theirs - 1))
    assert plain["reached"] == 1 and content["runs"] == 2 and content["of"] == 3
    assert "| GradDiff | TRACE | 1/1 |" in text and "2 of 3 runs" in text
    assert (tmp_path / "levers.png").stat().st_size > 1000
    lost = study.load(parts, traced(SPEC)) | {"matched": {"near": None, "retrain": None}}
    folder = tmp_path / "parts"
    for spec in (SPEC.models, SPEC):
        study.part(folder, spec).parent.mkdir(exist_ok=True)
        study.part(folder, spec).write_text(json.dumps(study.load(parts, spec)), encoding="utf-8")
    study.part(folder, traced(SPEC)).write_text(json.dumps(lost), encoding="utf-8")
    assert "| GradDiff | TRACE | 0/1 | – | – |" in study_report.write(tmp_path, entries, folder, "small")


def test_what_a_report_recorded_is_parts_again(parts, tmp_path, monkeypatch, capsys):
    entries = [Entry("main", "builtin:pydoc", "GradDiff", v, s) for v, s in (("plain", SPEC), ("TRACE", traced(SPEC)))]
    monkeypatch.setattr(study, "entries", lambda scale: entries)
    arguments = ["--small", "--out", str(tmp_path), "--parts"]
    assert study.main([*arguments, str(parts), "--report"]) == 0
    first, fresh = capsys.readouterr().out, tmp_path / "fresh"
    assert "2 of 2 runs" in first
    assert study.main([*arguments, str(fresh), "--list"]) == 0
    assert "2 of 2 runs done" in capsys.readouterr().out
    old, new = (study.load(folder, SPEC)["matched"]["retrain"] for folder in (parts, fresh))
    assert new == pytest.approx(old, rel=1e-5) and study.load(fresh, SPEC.models) is not None
    before = (tmp_path / "small" / study.RUNS).read_text(encoding="utf-8")
    assert study.main([*arguments, str(fresh), "--report"]) == 0
    assert capsys.readouterr().out == first and (tmp_path / "small" / study.RUNS).read_text(encoding="utf-8") == before


def test_a_run_in_which_trace_found_no_expert_is_counted_apart(parts, tmp_path):
    folder, none = tmp_path / "parts", study.load(parts, SPEC) | {"trace": None}
    folder.mkdir()
    for spec, result in ((SPEC.models, study.load(parts, SPEC.models)), (SPEC, none), (traced(SPEC), none)):
        study.part(folder, spec).write_text(json.dumps(result), encoding="utf-8")
    entries = [Entry("mismatch", "near", "GradDiff", v, s) for v, s in (("plain", SPEC), ("TRACE", traced(SPEC)))]
    text = study_report.write(tmp_path, entries, folder, "small")
    assert "| near | GradDiff | 0/1 |" in text


def test_a_corpus_of_two_sources_forgets_the_one_and_retains_the_other():
    try:
        both, devil = (data.load_builtin(name) for name in ("builtin:devil+pydoc", "builtin:devil"))
    except FileNotFoundError as error:
        pytest.skip(str(error))
    manual = {d.text for d in data.load_builtin("builtin:pydoc").retain}
    assert both.name == "builtin:devil+pydoc" and {d.text for d in both.retain} <= manual
    assert {d.text for d in both.forget} <= {d.text for d in devil.forget} and len(both.forget) > 400
    for name in ("devil+pydoc", "builtin:devil+x", "builtin:devil+pydoc+devil", "builtin:"):
        with pytest.raises(ValueError, match="expected one of builtin:devil, builtin:pydoc, or two"):
            data.load_builtin(name)


def test_the_command_lists_filters_and_ends(capsys, tmp_path):
    where = ["--parts", str(tmp_path), "--out", str(tmp_path)]  # nothing is recorded there
    arguments = ["--small", *where, "--only", "^main builtin:devil NPO .* 1$", "--list"]
    assert study.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[-1] == "0 of 5 runs done, on 1 pairs of models"
    assert all(line.startswith("todo main: builtin:devil: NPO") for line in lines[:-1])


@pytest.mark.quick
def test_a_scale_is_small_enough_to_be_called_small():
    small, whole = (study.entries(s) for s in (SCALES["small"], SCALES["whole"]))
    assert isinstance(SCALES["small"], Scale) and len({e.spec for e in small}) < len({e.spec for e in whole}) / 3
