"""Contenders measured side by side: their rounds take turns, and what counts is the ratio of their medians.

Machines share their cores with other work, so absolute times mean little and times from different runs
nothing. With one thread it is the processor time of the thread that counts, which leaves out what others take
from the clock. `OMP_NUM_THREADS=1 python -m benchmarks.bench_<op>` prints the ratios and writes
benchmarks/results/cpu/<op>.json.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from moe_unlearn import native

RESULTS = Path(__file__).parent / "results" / "cpu"


def compare(
    name: str,
    contenders: dict[str, Callable],
    *,
    target: float | None = None,
    rounds: int = 7,
    clock: Callable[[], float] | None = None,
) -> dict:
    """Measure the contenders, the first being ours; returns and prints medians and ratios to ours.

    Args:
        contenders: functions without arguments, each called once to warm up and then once a round.
        target: the ratio of the second contender to ours that is asked for.
        clock: seconds; as the module docstring says where it is None.
    """
    clock = clock or (time.thread_time if torch.get_num_threads() == 1 else time.perf_counter)
    for function in contenders.values():
        function()
    seconds = {key: [] for key in contenders}
    for _ in range(rounds):
        for key, function in contenders.items():
            start = clock()
            function()
            seconds[key].append(clock() - start)
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
    """Write results/cpu/<op>.json with what they were measured on."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    stamp = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "time": "processor" if torch.get_num_threads() == 1 else "wall",
        "instruction_set": native.instruction_set(),
        "processor": _processor(),
        "python": platform.python_version(),
    }
    Path(RESULTS, f"{op}.json").write_text(json.dumps(stamp | {"results": results}, indent=1) + "\n")


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())
