"""The benchmark of the whole step compares two ways of computing the same thing."""

import functools
from dataclasses import replace

import pytest
import torch

from benchmarks import bench_step, step_models, step_short, step_whole
from benchmarks.bench_step import Bench, Case
from moe_unlearn.experts import experts_modules

SMALL = {"num_experts": 8, "num_experts_per_tok": 2}


def change(case, name, model):
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    Bench(case, model, "cpu").contender(name)()
    moved = {n: p.detach() - before[n] for n, p in model.named_parameters()}
    for n, p in model.named_parameters():
        p.data.copy_(before[n])
    return moved


@pytest.mark.parametrize(
    "options", [{}, {"keep": 0.5}, {"experts": 2, "share": 0.25}], ids=["all", "masked", "experts"]
)
@pytest.mark.parametrize("objective", ["graddiff", "npo", "mollm"])
def test_contenders_make_the_same_update(objective, options):
    torch.manual_seed(0)
    model = step_models.build("wide", toy=True, **SMALL).float()
    case = Case("wide", objective, rows=2, length=16, **options)
    torch.manual_seed(1)  # of the random mask
    ours = change(case, "ours", model)
    total = torch.cat([m.flatten() for m in ours.values()])
    assert total.any()
    if case.experts:
        experts = next(iter(experts_modules(model)))
        rows = ours[f"{experts}.down_proj"].flatten(1).any(1)
        assert int(rows.sum()) == case.experts and not ours["lm_head.weight"].any()
    for name in ("ours, guard loss", "dense", "dense, two forwards", *(["restricted"] if not case.keep else [])):
        torch.manual_seed(1)
        other = torch.cat([m.flatten() for m in change(case, name, model).values()])
        # the first step of AdamW is a sign where a gradient is not tiny: few of them may differ
        assert torch.cosine_similarity(total, other, dim=0) > 0.999, name
        assert torch.equal(total == 0, other == 0) or ((total == 0) != (other == 0)).float().mean() < 1e-3, name


@pytest.fixture
def few_experts(monkeypatch):
    build = functools.partial(step_models.build, num_experts=16, num_experts_per_tok=2)
    monkeypatch.setattr(step_models, "build", build)


def test_the_gpu_form_builds_each_model_once_and_says_what_it_left_out(few_experts):
    few = ("ours", "ours, guard loss"), ("ours, compact",), ("ours", "dense")
    cases = [replace(case, contenders=names) for case, names in zip(bench_step.gpu_cases()[:3], few, strict=True)]
    models, seen = bench_step.Models("cpu", toy=True), []
    rows = bench_step.run_gpu(cases, models, progress=lambda row: seen.append(list(row["milliseconds"])))
    assert [set(row["milliseconds"]) for row in rows] == [set(case.contenders) for case in cases]
    assert all(row["extra_mib"].keys() == row["milliseconds"].keys() for row in rows)
    assert [case.geometry for case in cases] == ["Qwen3-30B-A3B", "Qwen3-30B-A3B", "OLMoE-1B-7B"] and models.built == 2
    # what a case has so far is told after each contender
    assert seen[:2] == [["ours"], ["ours", "ours, guard loss"]] and len(seen) == sum(len(c.contenders) for c in cases)
    assert "after 0 s" in bench_step.run_gpu(cases[:1], models, seconds=0)[0]["skipped"]
    assert "speed-up over dense" in bench_step.table(rows)


def test_the_gpu_s_first_case_trains_few_experts_under_a_mask():
    first, second, third = bench_step.gpu_cases()[:3]
    assert (first.geometry, first.share, first.keep, first.objective) == ("Qwen3-30B-A3B", 0.05, 0.5, "graddiff")
    assert second.objective == "mollm" and second.keep == first.keep and third.experts is None


def test_who_runs_out_of_memory_is_said_and_the_others_are_measured(monkeypatch, few_experts):
    case = replace(bench_step.gpu_cases()[2], contenders=("ours", "dense"))
    made = Bench.contender

    def contender(bench, name):
        if name == "dense":
            raise torch.OutOfMemoryError("no room")
        return made(bench, name)

    monkeypatch.setattr(Bench, "contender", contender)
    (row,) = bench_step.run_gpu([case], bench_step.Models("cpu", toy=True))
    assert row["out_of_memory"] == ["dense"] and list(row["milliseconds"]) == ["ours"]


@pytest.mark.quick
def test_verdicts_name_the_target_that_was_missed():
    row = {
        "name": "n",
        "geometry": "wide",
        "share": 0.2,
        "growth": "",
        "milliseconds": {"ours": 10, "dense": 25},
        "extra_mib": {"ours": 1.0, "dense": 4.0},
    }
    assert bench_step.verdicts(row) == [
        ("ours: speed-up over dense", 2.5, 3.0, False),
        ("ours: extra memory of dense's", 0.25, 1 / 3, True),
    ]
    assert "target 3: MISSED" in bench_step.table([row])


def test_all_stages_of_the_largest_model_are_rehearsed_at_toy_size():
    found = [case for case in step_short.cases("cpu", toy=True) if case.name == step_whole.NAME]
    row = found[0].make()
    (verdict,) = row["verdicts"]
    weights = sum(p.nbytes for p in step_models.build(step_whole.GEOMETRY, toy=True).parameters())
    assert len(found) == 1 and weights / 1e9 < verdict["value"] < 5 * weights / 1e9
    assert verdict["target"] == 110 and verdict["hit"] and 0.3 < row["kept"] <= 0.5
    assert list(row["seconds_of"]) == ["prepare", "step 1", "step 2"]
    assert found[0].title == f"step: {row['name']}" and found[0].tier == 0
    step_short.forget()
