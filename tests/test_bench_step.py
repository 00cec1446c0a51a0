"""The benchmark of the whole step compares two ways of computing the same thing."""

import pytest
import torch

from benchmarks import bench_step, step_models
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


def test_the_gpu_form_runs_and_says_what_it_left_out():
    cases = bench_step.gpu_cases()[:1]
    rows = bench_step.run_gpu(cases, "cpu", toy=True)
    assert [set(row["milliseconds"]) for row in rows] == [set(case.contenders) for case in cases]
    assert "after 0 s" in bench_step.run_gpu(cases[:1], "cpu", toy=True, seconds=0)[0]["skipped"]
    assert "speed-up over dense" in bench_step.table(rows)


@pytest.mark.quick
def test_verdicts_name_the_target_that_was_missed():
    row = {"name": "n", "geometry": "wide", "share": 0.2, "growth": "", "milliseconds": {"ours": 10, "dense": 25},
           "extra_mib": {"ours": 1.0, "dense": 4.0}}  # fmt: skip
    assert bench_step.verdicts(row) == [
        ("ours: speed-up over dense", 2.5, 3.0, False), ("ours: extra memory of dense's", 0.25, 1 / 3, True),
    ]  # fmt: skip
    assert "target 3: MISSED" in bench_step.table([row])
