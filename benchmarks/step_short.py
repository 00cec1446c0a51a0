"""Make the suite's cases of the whole step: on a CPU the rows of `bench_step` that have targets, on a GPU all rows.

Each row is a case of its own, so a run that must end keeps the rows it has.
"""

import functools
from dataclasses import replace

from benchmarks import bench_step, harness, step_whole
from benchmarks.bench_step import DENSE, OURS, RESTRICTED
from benchmarks.harness import Case

# (objective, experts that train): (contenders, those whose memory is measured, tier, seconds)
_CPU = {
    ("graddiff", 13): ((*OURS, DENSE, RESTRICTED), ("ours", DENSE), 0, 140),
    ("graddiff", None): ((*OURS, DENSE), (), 0, 90),
    ("graddiff", 3): ((OURS[0], DENSE, RESTRICTED), (), 0, 70),
}
# on a GPU: how many rows come first, and about how many seconds a row takes when kernels must be compiled
_GPU_FIRST, _GPU_SECONDS = 3, 30
_GPU_QWEN3 = 2
_models: dict[tuple[str, bool], bench_step.Models] = {}


def cases(device: str, *, toy: bool = False) -> list[Case]:
    if device == "cuda" or toy:
        found = [
            _case(c, functools.partial(on_gpu, c, device, toy), int(i >= _GPU_FIRST), _GPU_SECONDS)
            for i, c in enumerate(bench_step.gpu_cases())
        ]
        whole = Case("step", step_whole.NAME, ("ours",), functools.partial(all_stages, device, toy), 0, _GPU_SECONDS,
                     {"geometry": step_whole.GEOMETRY})  # fmt: skip
        # behind the cases of the same model, which has been made by then
        return [*found[:_GPU_QWEN3], whole, *found[_GPU_QWEN3:]]
    found = []
    for case in bench_step.cpu_cases():
        chosen = _CPU.get((case.objective, case.experts)) if case.geometry == "wide" else None
        if chosen and not case.growth and case.keep is None:
            contenders, memory, tier, seconds = chosen
            short = replace(case, contenders=contenders, memory=memory)
            found.append(_case(short, functools.partial(on_cpu, short), tier, seconds))
        if case.geometry == "tiny" and case.objective == "graddiff":
            found.append(_case(case, functools.partial(on_cpu, case), 1, 30))
    return found


def _case(case: bench_step.Case, make, tier: int, seconds: float) -> Case:
    return Case("step", case.name, case.contenders, make, tier, seconds, {"geometry": case.geometry})


def on_cpu(case: bench_step.Case) -> dict:
    return with_verdicts(bench_step.run_cpu(case))


def on_gpu(case: bench_step.Case, device: str, toy: bool) -> dict:
    models = _models.setdefault((device, toy), bench_step.Models(device, toy=toy))
    (row,) = bench_step.run_gpu([case], models, progress=lambda row: harness.progress(with_verdicts(row)))
    return with_verdicts(row)


def all_stages(device: str, toy: bool) -> dict:
    models = _models.setdefault((device, toy), bench_step.Models(device, toy=toy))
    return step_whole.measure(models.get(step_whole.GEOMETRY), device, toy=toy)


def forget() -> None:
    """Free the memory of the model that the last case left."""
    _models.clear()


def with_verdicts(row: dict) -> dict:
    """Return a row of `bench_step` in the suite's form."""
    found = [
        {"what": what, "value": value, "target": target, "hit": hit}
        for what, value, target, hit in bench_step.verdicts(row)
    ]
    missing = {name: "out of memory" for name in row.get("out_of_memory", ())}
    return {**row, "name": row["name"], "op": "step", "missing": missing, "verdicts": found}
