"""Measure contenders side by side: their rounds take turns, and the ratio of their times counts.

Machines share their cores with other work, so absolute times mean little, and times from different runs cannot be
compared. With one thread the processor time of the thread is measured, which excludes what other work takes from the
clock; on a GPU, CUDA events (`moe_unlearn.regress.timing`). The module adds what pytest-benchmark lacks: turns,
ratios with their interval, CUDA graphs, peak memory, useful FLOP/s, and the share of the roofline, whose two ceilings
are measured in the same run.

A case that names a contender either measures it or says why not: nothing is left out silently.
"""

import ctypes
import functools
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from moe_unlearn import backend, native
from moe_unlearn.regress import timing
from moe_unlearn.regress.fingerprint import cpu

RESULTS = Path(__file__).parent / "results" / "cpu"
OURS = "ours"
# implementations measured one by one beside the choice of "auto", where an op has several
SIDES = {"cuda": ("triton", "cuda"), "cpu": ()}
MIB = 2**20
# a case with cheap rounds goes on until it has taken this long or has this many rounds
CHEAP_SECONDS, MOST_ROUNDS = 1.0, 41
# the best of this many rounds counts as a ceiling
_CEILING_ROUNDS = 7


def progress(row: dict) -> None:
    """Report a row's results so far in a long case; a caller that runs cases replaces this function by its own."""


@dataclass
class Work:
    """Functions without arguments that a case made, over inputs that stay alive with them."""

    contenders: dict[str, Callable[[], object]]
    missing: dict[str, str] = field(default_factory=dict)  # why a contender is not among them
    targets: dict[str, float] = field(default_factory=dict)  # rival: how many times as fast as it ours shall be
    teraflops_target: float | None = None
    microseconds_target: float | None = None
    mib_target: float | None = None  # of extra memory
    flops: float = 0.0  # useful operations of one call
    bytes: float = 0.0  # the least that one call moves
    dtype: torch.dtype = torch.bfloat16
    rounds: int = 7  # at least this many
    memory: bool = False  # measures the extra memory of the first call, with the state that it makes
    graph: bool = False  # on a GPU measures also as a CUDA graph, without the cost of launching
    found: dict = field(default_factory=dict)  # further results


@dataclass(frozen=True, eq=False)
class Case:
    """One row of a benchmark.

    `names` are its contenders, ours first; `make` builds them, or returns a row that was measured in another way.
    """

    op: str
    name: str
    names: tuple[str, ...]
    make: Callable[[], Work | dict]
    tier: int = 1  # 0: a target depends on it; 1: the gate shapes; 2: for the report
    seconds: float = 10.0  # about what it takes
    facts: Mapping[str, object] = field(default_factory=dict)  # plain values: geometry, tokens, share ...

    @property
    def title(self) -> str:
        """Return a title that is unique among the cases."""
        return f"{self.op}: {self.name}"


def side(impl: str) -> str:
    """Return the contender's name for one of our implementations."""
    return f"{OURS}, {impl}"


def side_names(device: str) -> tuple[str, ...]:
    """Return the names of the contenders that `sides` makes or reports as missing."""
    return tuple(map(side, SIDES[device]))


def sides(kernel: str, device: str, call: Callable[[str], object]) -> tuple[dict[str, Callable], dict[str, str]]:
    """Return (contenders, missing): `call(impl)` for each compared implementation of a kernel's registered name."""
    usable, found, missing = backend.available(kernel, device), {}, {}
    for impl in SIDES[device]:
        if impl in usable:
            found[side(impl)] = functools.partial(call, impl)
        else:
            why = native.load(impl) if impl in native.LIBRARIES else ""
            missing[side(impl)] = why or f"{kernel} has no implementation {impl} here"
    return found, missing


def built(case: Case) -> Work | dict:
    """Return what the case makes; raise AssertionError where a contender is neither there nor said to be missing."""
    made = case.make()
    if isinstance(made, Work):
        silent = set(case.names) ^ (made.contenders.keys() | made.missing.keys())
        assert not silent, f"{case.title}: neither measured nor missing, or not announced: {sorted(silent)}"
    return made


def run(case: Case, device: str, ceilings: Mapping) -> dict:
    """Return the row of a case, as plain values.

    A rival that fails is listed as missing, with the reason; where ours fails the row has an `error` and no times.
    Errors that leave a GPU unusable are raised.
    """
    row = {"op": case.op, "name": case.name, **case.facts}
    work = built(case)
    if isinstance(work, dict):
        return row | work
    row |= {"missing": dict(work.missing), "extra_mib": {}}
    able = {}
    for name, function in work.contenders.items():
        try:
            extra = peak_memory(function, device)
        except Exception as error:  # noqa: BLE001 -- of a rival anything may come, and it is said what
            row["missing"][name] = f"failed: {brief(error)}"
            still_usable(device, name, error)
            continue
        able[name] = function
        if work.memory and extra is not None:
            row["extra_mib"][name] = round(extra / MIB, 1)
    if OURS not in able:
        return row | {"error": row["missing"].get(OURS, "ours is not there")}
    if work.graph and device == "cuda":
        able |= _graphs(able, row["missing"])
    seconds = timed(able, work.rounds, device)
    row |= work.found | {"rounds": len(seconds[OURS]), "dtype": str(work.dtype).removeprefix("torch.")}
    return row | figures(seconds, work, ceilings) | {"verdicts": verdicts(seconds, work, row["extra_mib"])}


def timed(contenders: Mapping[str, Callable], rounds: int, device: str) -> dict[str, list[float]]:
    """Return `timing.measure`'s times of at least `rounds` rounds, and of more where they are cheap.

    More rounds narrow the interval. Where they are not cheap, a round has one reading of each contender.
    """
    start = time.monotonic()
    for function in contenders.values():
        function()
    repeats = timing.REPEATS if time.monotonic() - start < CHEAP_SECONDS else 1
    turns = timing.take_turns(contenders, repeats=repeats, device=device)
    table, end = [], time.monotonic() + CHEAP_SECONDS
    while len(table) < rounds or (len(table) < MOST_ROUNDS and time.monotonic() < end):
        table.append(next(turns))
    return {name: [row[name] for row in table] for name in contenders}


def figures(seconds: Mapping[str, list[float]], work: Work, ceilings: Mapping) -> dict:
    """Return the medians, and from them useful TFLOP/s and the share of the roofline's least time."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    found = {"milliseconds": {name: round(1e3 * value, 4) for name, value in medians.items()}}
    peak = ceilings.get("flops", {}).get(str(work.dtype).removeprefix("torch."))
    if work.flops:
        found["teraflops"] = {name: round(work.flops / value / 1e12, 4) for name, value in medians.items()}
        found["flops"] = work.flops
    if work.bytes:
        found["bytes"] = work.bytes
    if (work.flops and peak) or (work.bytes and ceilings.get("bytes")):
        least = max(work.flops / peak if work.flops and peak else 0, work.bytes / ceilings.get("bytes", float("inf")))
        found["roofline"] = {name: round(least / value, 4) for name, value in medians.items()}
    return found


def verdicts(seconds: Mapping[str, list[float]], work: Work, extra_mib: Mapping[str, float]) -> list[dict]:
    """Return each result beside its target, hits and misses alike."""
    found = []

    def add(what: str, value: float, target: float | None, *limits: float, at_most: bool = False) -> None:
        hit = None if target is None else bool(value <= target if at_most else value >= target)
        row = {"what": what, "value": round(value, 3), "target": target, "hit": hit}
        found.append(row | ({"low": round(limits[0], 3), "high": round(limits[1], 3)} if limits else {}))

    for rival in seconds:
        if not rival.startswith(OURS):
            add(f"times as fast as {rival}", *_with_target(seconds, rival, work.targets.get(rival)))
    first, second = map(side, SIDES["cuda"])
    if first in seconds and second in seconds:
        times = timing.ratio(seconds[second], seconds[first])
        add(f"{second}: times as fast as {first}", times.value, None, times.low, times.high)
    ours = statistics.median(seconds[OURS])
    if work.teraflops_target:
        add("TFLOP/s", work.flops / ours / 1e12, work.teraflops_target)
    if work.microseconds_target:
        best = min(statistics.median(values) for name, values in seconds.items() if name.startswith(OURS))
        add("microseconds", 1e6 * best, work.microseconds_target, at_most=True)
    if work.mib_target and OURS in extra_mib:
        add("MiB of extra memory", extra_mib[OURS], work.mib_target, at_most=True)
    for rival, size in extra_mib.items():
        if rival != OURS and size and extra_mib.get(OURS) is not None:
            add(f"extra memory of that of {rival}", extra_mib[OURS] / size, None)
    return found


def _with_target(seconds, rival, target):
    interval = timing.ratio(seconds[OURS], seconds[rival])
    return interval.value, target, interval.low, interval.high


def measure_ceilings(device: str, size: int | None = None) -> dict:
    """Return {"flops": {dtype: FLOP/s of a square product}, "bytes": bytes/s that a copy reads and writes}."""
    n = size or (8192 if device == "cuda" else 1024)
    result = {"flops": {}}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty(n, n, device=device, dtype=dtype)
        result["flops"][str(dtype).removeprefix("torch.")] = (
            2.0 * n**3 / _best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device)
        )
    source = torch.ones((size or (8192 if device == "cuda" else 4096)) ** 2, device=device)
    copy = torch.empty_like(source)
    result["bytes"] = 2.0 * source.numel() * source.element_size() / _best(lambda: copy.copy_(source), device)
    return result


def _best(function: Callable[[], object], device: str) -> float:
    return min(timing.measure({"ceiling": function}, rounds=_CEILING_ROUNDS, device=device)["ceiling"])


def peak_memory(function: Callable[[], object], device: str) -> float | None:
    """Return the bytes by which one call raises the peak above what is held before, or None if the system hides it.

    On a CPU this is the peak of the resident set, after the allocator has given back what it keeps.
    """
    collect(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    told = _forget_peak()
    before = resident("VmRSS") if told else 0
    function()
    return resident("VmHWM") - before if told else None


def collect(device: str) -> None:
    """Free everything that is no longer referenced, in the allocators too."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    elif platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _forget_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def resident(what: str) -> int:
    """Return the bytes of this process now ("VmRSS") or at their peak ("VmHWM")."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def brief(error: Exception) -> str:
    """Return the error's kind and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def still_usable(device: str, name: str, error: Exception) -> None:
    """Raise RuntimeError where the contender's `error` has left the GPU unusable for this process."""
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except Exception as lost:
        raise RuntimeError(f"{name} left the device unusable: {brief(error)}") from lost


def _graphs(able: Mapping[str, Callable], missing: dict[str, str]) -> dict[str, Callable]:
    """Return the contenders recorded as CUDA graphs, each under its name with ", graph" appended."""
    graphs = {}
    for name, function in able.items():
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                function()
        except Exception as error:  # noqa: BLE001 -- whoever waits for the device cannot be recorded
            missing[f"{name}, graph"] = f"cannot be recorded: {brief(error)}"
            still_usable("cuda", name, error)
            continue
        graphs[f"{name}, graph"] = graph.replay
    return graphs


def compare(
    name: str,
    contenders: dict[str, Callable],
    *,
    target: float | None = None,
    rounds: int = 7,
    clock: Callable[[], float] | None = None,
) -> dict:
    """Measure contenders too long to be repeated, ours first; print and return medians and ratios.

    Args:
        contenders: functions without arguments, each called once to warm up and then once a round.
        target: the ratio of the second contender's time to ours that is asked for.
        clock: returns seconds; None takes the one that the module docstring describes.
    """
    seconds = timing.measure(contenders, rounds=rounds, warm_up=0.0, shortest=0.0, clock=clock)
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    ours, *rivals = medians
    result = {"name": name, "rounds": rounds, "milliseconds": {k: round(1e3 * v, 3) for k, v in medians.items()}}
    result["ratios"] = {key: round(medians[key] / medians[ours], 2) for key in rivals}
    if target is not None:
        result["target"] = target
        result["reached"] = result["ratios"][rivals[0]] >= target
    times = ", ".join(f"{key} {value:.2f} ms" for key, value in result["milliseconds"].items())
    ratios = ", ".join(f"{value:.2f} x {key}" for key, value in result["ratios"].items())
    verdict = "" if target is None else f" (target {target}: {'hit' if result['reached'] else 'missed'})"
    print(f"{name}: {ratios}{verdict}; {times}", flush=True)
    return result


def write(op: str, results: list[dict]) -> None:
    """Write results/cpu/<op>.json, with a stamp of what the results were measured on."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    stamp = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "time": "processor" if torch.get_num_threads() == 1 else "wall",
        "instruction_set": native.instruction_set(),
        "processor": cpu(),
        "python": platform.python_version(),
    }
    Path(RESULTS, f"{op}.json").write_text(json.dumps(stamp | {"results": results}, indent=1) + "\n", encoding="utf-8")
