"""Measure what TRACE, WAGLE and MOLLM together take on a GPU: statistics, references, the mask and steps.

The model has Qwen3-30B-A3B's geometry and random weights, made on the device; the mask is made within a budget, and
six experts a layer train. All is measured in one go beyond the weights, as torch's allocator has it. Nobody has run
this on a GPU yet: a test rehearses it at toy size on a CPU, by the same code.
"""

import time

from torch import nn

from benchmarks import step_models
from moe_unlearn.config import Recipe
from moe_unlearn.plan.memory import measured_peak
from moe_unlearn.step import UnlearnStep

GEOMETRY = "Qwen3-30B-A3B"
NAME = f"{GEOMETRY} TRACE + WAGLE + MOLLM, 6 experts a layer, the mask included"
TARGET = 110.0  # GB at the peak
MEMORY, TOY_MEMORY = "24GiB", "1MiB"  # of the mask's gradients; those of all weights take 244 GB
# as many experts train as asked for, whatever the routing of random weights
_OPTIONS = (
    "scope.kind=experts",
    "trace.per_layer=6",
    "trace.min_ratio=0.0",
    "trace.min_load=0.0",
    "trace.eta=0.1",
    "wagle.keep=0.5",
)
_STEPS = 2


def measure(model: nn.Module, device: str, *, toy: bool = False) -> dict:
    """Return a row of the suite: GB at the peak, seconds of the preparation and of each step."""
    rows, length = (2, 16) if toy else (8, 512)
    forget, retain = (step_models.batch(model.config.vocab_size, rows, length, seed, device) for seed in (1, 2))
    memory = TOY_MEMORY if toy else MEMORY
    step = UnlearnStep(step_models.twin(model), Recipe.load("combined", [*_OPTIONS, f"wagle.memory={memory}"]))
    seconds, began = {}, time.perf_counter()
    with measured_peak(device) as measured:
        step.prepare([forget], [retain])
        seconds["prepare"] = time.perf_counter() - began
        for i in range(_STEPS):
            began = time.perf_counter()
            step(forget, retain)  # whose numbers are read, so that the device has finished
            seconds[f"step {i + 1}"] = time.perf_counter() - began
    value = round((sum(p.nbytes for p in model.parameters()) + measured.peak) / 1e9, 3)
    verdict = {"what": "GB at the peak, all stages", "value": value, "target": TARGET, "hit": value <= TARGET}
    return {
        "op": "step",
        "name": NAME,
        "geometry": GEOMETRY,
        "memory": memory,
        "seconds_of": {name: round(taken, 2) for name, taken in seconds.items()},
        "kept": round(step.prepared.mask.fraction, 4),
        "missing": {},
        "verdicts": [verdict],
    }
