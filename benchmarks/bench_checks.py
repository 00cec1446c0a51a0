"""Measure what checks of operands cost in a step, and digests and syncs in a save, in turns with the same without.

    python -m benchmarks.bench_checks [--rounds N]

A step is GradDiff with AdamW on an OLMoE of two layers, at the size of tests and at 8 x 128 tokens; a save is what
`UnlearnTrainer` puts into a checkpoint, of the same model and of one 256 times as large. Steps are compared by the
processor time of this thread, saves by wall time too, since a sync waits for the disk. Each figure is the lower
quartile of its rounds.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from moe_unlearn.checkpoint import manifest, save_state
from moe_unlearn.config import Recipe
from moe_unlearn.files import remove_folder, whole_folder
from moe_unlearn.model.saving import save_model
from moe_unlearn.step import UnlearnStep

VOCABULARY = 64
# what is switched off, and by what it is replaced: the names under which callers know the checks
_BATCH = ("moe_unlearn.step.admission.check_values",)
_CHECKS = {
    "expert_mlp": ("check_layer", "check_objects", "check_routing"),
    "expert_wgrad": ("check_factors", "check_objects", "check_rows", "check_momentum"),
    "gram": ("check_offsets",),
    "masked_update": ("check_indices", "check_objects", "check_update"),
    "token_loss": ("check_objects",),
}
_OPERANDS = tuple(f"moe_unlearn.ops.{op}.{check}" for op, checks in _CHECKS.items() for check in checks)
STEPS = {"all checks": (), "no check of batches": _BATCH, "no check of operands": _OPERANDS, "none": _BATCH + _OPERANDS}
_SYNC, _DIGEST = ("moe_unlearn.files._sync",), ("moe_unlearn.checkpoint.manifest.describe",)
SAVES = {"digests and syncs": (), "no sync": _SYNC, "no digest": _DIGEST, "neither": _SYNC + _DIGEST}


def without(places: Sequence[str]) -> ExitStack:
    """Return a context in which the functions at `places` do nothing."""
    stack = ExitStack()
    for place in places:
        module, name = place.rsplit(".", 1)
        stack.enter_context(patch.object(import_module(module), name, _nothing))
    return stack


def _nothing(*given: object, **options: object) -> dict[str, object]:
    return {"size": 0, "sha256": ""}  # what a manifest says of a file


def step_of(rows: int, length: int, hidden: int = 32) -> tuple[UnlearnStep, Callable[[], object]]:
    """Return a step that has been made three times, and what makes it once more."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        pad_token_id=0,
        eos_token_id=2,
    )
    recipe = Recipe.load("graddiff", ["optimizer.name=adamw", "optimizer.lr=1e-5"])
    step = UnlearnStep(OlmoeForCausalLM(config), recipe)
    ids = torch.randint(3, VOCABULARY, (2, rows, length))
    forget, retain = ({"input_ids": one, "attention_mask": torch.ones_like(one), "labels": one} for one in ids)
    step.prepare([forget], [retain])
    for _ in range(3):
        step(forget, retain)
    return step, lambda: step(forget, retain)


def save(step: UnlearnStep, folder: Path) -> None:
    """Write what a checkpoint has, under its own manifest."""
    with whole_folder(folder) as unfinished:
        save_model(step.model, unfinished)
        save_state(unfinished, "step", step.state_dict())
        manifest.seal(unfinished, {"step": step.steps})


def in_turns(
    act: Callable[[], object], ways: dict[str, tuple[str, ...]], rounds: int, after: Callable[[], object] = _nothing
) -> Iterator[tuple[str, float, float]]:
    """Yield (way, processor and wall milliseconds) of `act`, whose `ways` take turns; `after` is not timed."""
    spent: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, places in ways.items():
            with without(places):
                began = time.thread_time(), time.perf_counter()
                act()
                ended = time.thread_time(), time.perf_counter()
            after()
            spent[way].append((1e3 * (ended[0] - began[0]), 1e3 * (ended[1] - began[1])))
    for way, both in spent.items():
        own, wall = (statistics.quantiles(times, n=4)[0] for times in zip(*both, strict=True))
        yield way, own, wall


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=100, help="of each way of a step; a tenth of them of a save")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("| what | how | processor ms | wall ms |\n|---|---|---|---|")
    for rows, length in ((4, 12), (8, 128)):
        _, act = step_of(rows, length)
        for way, own, wall in in_turns(act, STEPS, rounds):
            print(f"| step, {rows} x {length} | {way} | {own:.2f} | {wall:.1f} |")
    for hidden in (32, 512):
        step, _ = step_of(4, 12, hidden)
        size = 3 * sum(p.nbytes for p in step.model.parameters()) / 1e6  # with both moments
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "saved"
            act, after = partial(save, step, place), partial(remove_folder, place)
            for way, own, wall in in_turns(act, SAVES, max(rounds // 10, 2), after):
                print(f"| save, {size:.1f} MB | {way} | {own:.1f} | {wall:.1f} |")


if __name__ == "__main__":
    main()
