"""Measure the whole unlearning step, losses to updated weights, against what a user has today (`step_rivals`).

    OMP_NUM_THREADS=1 python -m benchmarks.bench_step            every case; the table; results/cpu/step.json
    python -m benchmarks.bench_step --only "wide npo"            cases whose name contains this; other rows are kept
    python -m benchmarks.bench_step --device cuda                the GPU form: three published geometries, one after
                                                                 the other; `benchmarks.suite` runs it case by case
    python -m benchmarks.bench_step --device cpu --toy           the GPU form's code at toy size; writes nothing

On a CPU the contenders of a case take turns in one process, and the ratio of their medians counts. On a GPU they run
one after the other, because preparing one takes longer than its steps and no other work disturbs the clock. They
train the same weights in memory, so that the largest model that fits can be measured. Extra memory is the peak
beyond weights and batches: of the resident set of a fresh process, or of the allocator on a GPU.

Batches are random whole rows, and TRACE selects the experts that train. AdamW keeps its moments in the weights'
dtype, as torch's does ("parity"), unless a contender's name says otherwise.
"""

import argparse
import functools
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from benchmarks import harness, stamp, step_models
from benchmarks.step_rivals import Rival, free_experts
from moe_unlearn.config import Recipe
from moe_unlearn.step import UnlearnStep

GPU_SECONDS = 450  # no case starts later, so a started one ends within nine minutes
TARGETS = {1.0: 2.0, 0.2: 3.0, 0.05: 4.0}
MEMORY_TARGET, CEILING_TARGET = 1 / 3, 0.8
MOLLM_TARGETS = {"ours, compact": 1.4, "ours, factors": 1.9}  # at most this multiple of GradDiff's time
MOLLM = (*MOLLM_TARGETS, "ours, GradDiff")
OURS, DENSE, RESTRICTED, FREE = ("ours", "ours, guard loss"), "dense", "restricted", "free experts"


@dataclass(frozen=True)
class Case:
    """One row of the table: in each layer `experts` train, or everything if it is None; `keep` also masks weights."""

    geometry: str
    objective: str
    experts: int | None = None
    share: float = 1.0
    keep: float | None = None
    rows: int = 4  # of each side
    length: int = 128
    contenders: tuple[str, ...] = ()  # timed contenders; see `Bench.contender`
    memory: tuple[str, ...] = ()  # contenders whose extra memory is measured
    growth: str = ""  # the plot that has a point of this row
    changes: dict = field(default_factory=dict)  # to the model's config

    @property
    def name(self) -> str:
        """Return a name that is unique among the cases."""
        scope = "all" if self.experts is None else f"{self.experts} experts a layer ({self.share:.0%})"
        scope += "" if self.keep is None else f", {self.keep:.0%} of the weights"
        changes = "".join(f", {key} {value}" for key, value in self.changes.items())
        return f"{self.geometry} {self.objective}, {scope}, {2 * self.rows * self.length} tokens{changes}"


class Bench:
    """Makes the contenders of a case over a model; contenders that differ only in a switch share their state."""

    def __init__(self, case: Case, model: nn.Module, device: str):
        self.case, self.model = case, model
        vocab = model.config.vocab_size
        self.forget, self.retain = (step_models.batch(vocab, case.rows, case.length, s, device) for s in (1, 2))
        self._steps: dict[tuple, UnlearnStep] = {}
        self._rivals: dict[str, Rival] = {}

    def contender(self, name: str) -> Callable[[], dict]:
        """Return the step that a name's words choose.

        Ours: GradDiff, stochastic, guard loss, MOLLM's compact or factors. Rivals: dense or restricted (two forwards,
        fused), free experts.
        """
        if name.startswith("ours"):
            numerics = "stochastic" if "stochastic" in name else "parity"
            guard = "loss" if "guard loss" in name else "strict"
            step = self._step("graddiff" if "GradDiff" in name else self.case.objective, numerics)
            form = next((word for word in ("compact", "factors") if word in name), "auto")

            def ours() -> dict:
                own = step.recipe.mollm
                step.recipe = replace(step.recipe, guard=guard, mollm=own and replace(own, gradients=form))
                return step(self.forget, self.retain)

            return ours
        kind = name.partition(",")[0]
        if kind not in self._rivals:
            model = step_models.twin(self.model)
            reference = self._steps.get((self.case.objective, "parity")) or self._made(self.case.objective, "parity")
            self._rivals[kind] = Rival(model, reference, self.forget, self.retain, restricted=kind == RESTRICTED)
            if kind == FREE:
                free_experts(model)
        rival, fused = self._rivals[kind], True if "fused" in name or kind == RESTRICTED else None
        return lambda: rival(joint="two forwards" not in name, fused=fused)

    def _step(self, objective: str, numerics: str) -> UnlearnStep:
        if (objective, numerics) not in self._steps:
            self._steps[objective, numerics] = self._made(objective, numerics)
        return self._steps[objective, numerics]

    def _made(self, objective: str, numerics: str) -> UnlearnStep:
        options = [f"optimizer.numerics={numerics}", "optimizer.lr=1e-5"]
        if self.case.experts is not None:
            # train as many experts as asked for, whatever the routing of random weights
            options += ["scope.kind=experts", f"trace.per_layer={self.case.experts}", "trace.min_ratio=0.0",
                        "trace.min_load=0.0", "trace.eta=0.1"]  # fmt: skip
        step = UnlearnStep(step_models.twin(self.model), Recipe.load(objective, options))
        if self.case.keep is not None:
            state = step.state_dict()
            state["prepared"]["mask"] = step_models.random_mask(self.model, self.case.keep)
            step.load_state_dict(state)
        step.prepare([self.forget], [self.retain])
        return step

    def drop(self, device: str) -> None:
        """Drop the contenders made so far."""
        self._steps.clear()
        self._rivals.clear()
        _collect(device)


def measure_times(bench: Bench) -> dict:
    """Return the medians in milliseconds on a CPU; the contenders take turns."""
    case = bench.case
    user = {name: [] for name in case.contenders}
    made = {name: watched(bench.contender(name), user[name]) for name in case.contenders}
    rounds = 2 if case.geometry == "wide" else 5
    times = {"milliseconds": harness.compare(case.name, made, rounds=rounds)["milliseconds"]}
    # user time excludes what the system took to hand out memory; the warm-up is left out
    return times | {"user_milliseconds": {name: round(statistics.median(t[1:]), 3) for name, t in user.items()}}


def watched(step: Callable[[], dict], user: list[float]) -> Callable[[], None]:
    """Return the step as it is timed; it adds its user time in milliseconds to `user`."""

    def run() -> None:
        start = resource.getrusage(resource.RUSAGE_THREAD).ru_utime
        step()
        user.append(1e3 * (resource.getrusage(resource.RUSAGE_THREAD).ru_utime - start))

    return run


def measure_memory(bench: Bench, name: str, device: str, then: Callable = lambda step: None) -> tuple[float, object]:
    """Return the extra memory of a contender in MiB, and what `then(step)` returns.

    The extra memory is the peak of two steps beyond weights and batches, preparation included.
    """
    _collect(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
        before, peak = harness.resident("VmRSS"), lambda: harness.resident("VmHWM")
    step = bench.contender(name)
    for _ in range(2):
        step()
    result = round((peak() - before) / harness.MIB, 1), then(step)
    del step
    bench.drop(device)
    return result


def median_time(device: str, step: Callable[[], dict], rounds: int = 5) -> float:
    """Return the median time in milliseconds of a warm step, launches included."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times), 3)


def _collect(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def cpu_cases() -> list[Case]:
    """Return the cases of the wide and the demo's model, then the plots' points (one layer of the wide model)."""
    ours, cases, memory = OURS, [], ("ours", "ours, guard loss", DENSE, RESTRICTED)
    for objective in ("graddiff", "npo"):
        more = ("dense, fused AdamW",) if objective == "graddiff" else ()
        watched = memory[:3] if more else ()
        cases.append(Case("wide", objective, contenders=(*ours, DENSE, *more), memory=watched))
    cases.append(Case("wide", "graddiff", keep=0.5, contenders=(*ours, DENSE, "dense, fused AdamW")))
    # three dense gradient sets and our own do not fit beside both layers
    cases.append(Case("wide", "mollm", contenders=(*MOLLM, DENSE), changes={"num_hidden_layers": 1}))
    for experts, share in ((13, 0.2), (3, 0.05)):
        for objective in ("graddiff", "npo", "mollm"):
            first = objective == "graddiff"
            more = ("ours, stochastic",) if first and share == 0.2 else ()
            own = MOLLM if objective == "mollm" else ours
            watched = {"graddiff": memory, "mollm": (*MOLLM_TARGETS, DENSE)}.get(objective, ()) if share == 0.2 else ()
            cases.append(
                Case("wide", objective, experts, share, contenders=(*own, DENSE, RESTRICTED, *more), memory=watched)
            )
    for objective in ("graddiff", "npo", "mollm"):
        own = MOLLM if objective == "mollm" else ours
        cases.append(Case("tiny", objective, rows=40, length=64, contenders=(*own, DENSE, FREE)))
    layer, held = {"num_hidden_layers": 1}, memory[:3]
    for length in (32, 64, 128, 256):
        cases.append(Case("wide", "graddiff", 13, 0.2, length=length,
                          contenders=(*ours, DENSE, RESTRICTED, *(("dense, two forwards",) if length == 128 else ())),
                          growth="time over tokens", changes=layer))  # fmt: skip
    for experts in (3, 13, 26, 39, 52, 64):
        cases.append(Case("wide", "graddiff", experts, experts / 64, length=64, memory=held,
                          growth="memory over trained experts", changes=layer))  # fmt: skip
    for total in (16, 32, 64, 128):
        cases.append(Case("wide", "graddiff", 8, 8 / total, length=64, memory=held,
                          growth="memory over all experts", changes={**layer, "num_experts": total}))  # fmt: skip
    return cases


def gpu_cases() -> list[Case]:
    """Return the cases of the published geometries, at 8192 tokens, the most important first.

    A model's cases stand together as far as that order allows. The first two train TRACE's experts under a mask such
    as WAGLE's. A contender that runs out of memory is reported.
    """
    size = {"rows": 8, "length": 512}
    every, mollm = (*OURS, DENSE, RESTRICTED), (*MOLLM, DENSE, RESTRICTED)
    cases = [
        Case("Qwen3-30B-A3B", "graddiff", 6, 0.05, keep=0.5, contenders=every, **size),
        Case("Qwen3-30B-A3B", "mollm", 6, 0.05, keep=0.5, contenders=MOLLM, **size),
        Case("OLMoE-1B-7B", "graddiff", contenders=(*OURS, DENSE, "dense, fused AdamW"), **size),
    ]
    for geometry, total in (("OLMoE-1B-7B", 64), ("Qwen3-30B-A3B", 128), ("DeepSeek-V2-Lite", 64)):
        for share in (0.2, 0.05):
            cases.append(Case(geometry, "graddiff", round(share * total), share, contenders=every, **size))
        cases.append(Case(geometry, "mollm", round(0.05 * total), 0.05, contenders=mollm, **size))
    return [replace(case, memory=case.contenders) for case in cases]


def run_cpu(case: Case) -> dict:
    """Return a row of the table; each measurement runs in its own process and so starts from the same memory."""
    row = {"name": case.name, **asdict(case)}
    if case.contenders:
        row |= _child(case, "")
    if case.memory:
        row["extra_mib"] = {name: _child(case, name)["extra_mib"] for name in case.memory}
    return row


def _child(case: Case, memory: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.bench_step", "--case", json.dumps(asdict(case)), "--memory", memory]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def child(case: Case, memory: str) -> dict:
    """Return what one process of `run_cpu` measures."""
    bench = Bench(case, step_models.build(case.geometry, **case.changes), "cpu")
    return {"extra_mib": measure_memory(bench, memory, "cpu")[0]} if memory else measure_times(bench)


class Models:
    """Keeps the model of the last geometry, so that consecutive cases build it once."""

    def __init__(self, device: str, *, toy: bool):
        self.device, self.toy, self.built = device, toy, 0
        self._geometry, self._model = "", None

    def get(self, geometry: str) -> nn.Module:
        if geometry != self._geometry:
            self._model, self._geometry = None, ""
            _collect(self.device)
            self._model = step_models.build(geometry, self.device, toy=self.toy)
            self._geometry, self.built = geometry, self.built + 1
        return self._model


def run_gpu(
    cases: list[Case],
    models: Models,
    *,
    seconds: float = GPU_SECONDS,
    progress: Callable[[dict], None] = lambda row: None,
) -> list[dict]:
    """Return all rows, measured in one process; cases that start too late are marked as skipped.

    After each contender, `progress(row)` is called with the row so far.
    """
    device, toy, start, rows = models.device, models.toy, time.perf_counter(), []
    for case in cases:
        row = {"name": case.name, **asdict(case)}
        rows.append(row)
        if time.perf_counter() - start > seconds:
            row["skipped"] = f"after {seconds:.0f} s"
            continue
        bench = Bench(replace(case, rows=2, length=32) if toy else case, models.get(case.geometry), device)
        row |= {"extra_mib": {}, "milliseconds": {}, "interleaved": False}
        for name in case.contenders:
            try:
                mib, milliseconds = measure_memory(bench, name, device, functools.partial(median_time, device))
            except torch.OutOfMemoryError:
                bench.drop(device)
                row.setdefault("out_of_memory", []).append(name)
            else:
                row["extra_mib"][name], row["milliseconds"][name] = mib, milliseconds
            progress(row)
    return rows


def verdicts(row: dict) -> list[tuple[str, float, float | None, bool | None]]:
    """Return the verdicts of a row as (what, result, target, hit)."""
    ms, mib, found = row.get("milliseconds", {}), row.get("extra_mib", {}), []

    def add(what: str, value: float, target: float | None = None, *, at_most: bool = False) -> None:
        hit = None if target is None else (value <= target if at_most else value >= target)
        found.append((what, round(value, 2), target, hit))

    for ours in (name for name in ms if name.startswith("ours") and "GradDiff" not in name):
        for rival in (name for name in ms if not name.startswith("ours")):
            if rival == FREE:
                add(f"{ours}: share of the ceiling", ms[FREE] / ms[ours], CEILING_TARGET)
                continue
            wide = row["geometry"] == "wide" and not row["growth"] and rival == DENSE
            add(f"{ours}: speed-up over {rival}", ms[rival] / ms[ours], TARGETS[row["share"]] if wide else None)
    for ours in (name for name in MOLLM_TARGETS if name in ms and "ours, GradDiff" in ms):
        add(f"{ours}: time of GradDiff's", ms[ours] / ms["ours, GradDiff"], MOLLM_TARGETS[ours], at_most=True)
    for ours in (name for name in mib if name.startswith("ours") and mib.get(DENSE)):
        target = MEMORY_TARGET if row["share"] == 0.2 and not row["growth"] else None
        add(f"{ours}: extra memory of dense's", mib[ours] / mib[DENSE], target, at_most=True)
    return found


def table(rows: list[dict]) -> str:
    """Return a table with every result beside its target."""
    lines = []
    for row in rows:
        lines.append(row["name"])
        times = ", ".join(f"{name} {value:.0f} ms" for name, value in row.get("milliseconds", {}).items())
        sizes = ", ".join(f"{name} {value:.0f} MiB" for name, value in row.get("extra_mib", {}).items())
        lines += [f"    {text}" for text in (times, sizes) if text]
        lines += [f"    out of memory: {', '.join(row['out_of_memory'])}"] if "out_of_memory" in row else []
        for what, value, target, hit in verdicts(row):
            asked = "" if target is None else f"   target {target:.3g}: {'hit' if hit else 'MISSED'}"
            lines.append(f"    {what:<52} {value:6.2f}{asked}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--toy", action="store_true", help="the GPU form's code at toy size")
    parser.add_argument("--only", default="", help="cases whose name or plot holds this")
    parser.add_argument("--table", action="store_true", help="print what has been measured")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--memory", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(child(Case(**json.loads(arguments.case)), arguments.memory)))
        return
    gpu = arguments.device == "cuda" or arguments.toy
    cases = [c for c in (gpu_cases() if gpu else cpu_cases()) if arguments.only in f"{c.name}, {c.growth}"]
    if gpu:
        rows = run_gpu(cases, Models(arguments.device, toy=arguments.toy))
        print(table(rows))
        if not arguments.toy:
            folder = harness.RESULTS.parent / stamp.folder_of(torch.cuda.get_device_name())
            folder.mkdir(parents=True, exist_ok=True)
            Path(folder, "step.json").write_text(
                json.dumps({"stamp": stamp.stamp(), "rows": rows}, indent=1) + "\n", encoding="utf-8"
            )
        return
    path = harness.RESULTS / "step.json"
    held = (
        {row["name"] + row["growth"]: row for row in json.loads(path.read_text(encoding="utf-8"))["results"]}
        if path.exists()
        else {}
    )
    for case in [] if arguments.table else cases:
        held[case.name + case.growth] = run_cpu(case)
        # written after every case, so that an interrupted run keeps its rows
        harness.write("step", [held[c.name + c.growth] for c in cpu_cases() if c.name + c.growth in held])
    print(table([held[c.name + c.growth] for c in cases if c.name + c.growth in held]))


if __name__ == "__main__":
    main()
