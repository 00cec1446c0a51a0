"""Two ranks make steps under FSDP2 and say what each keeps: bits of rounding, masks, states."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from moe_unlearn import masks
from moe_unlearn.checkpoint import sharded
from moe_unlearn.sharding import part
from moe_unlearn.step import UnlearnStep
from tests.support import sharded_child
from tests.support.sharded_child import ADAMW, FLOOR, STEPS, batches_of, masks_of, shard, weights_of
from tests.support.steps import data, made_of, recipe

# cases in bfloat16
NARROW = {
    "stochastic": ("graddiff", ADAMW),
    "stochastic combined": ("combined", (*ADAMW, *FLOOR)),
    "masters": ("graddiff", (*ADAMW, "optimizer.numerics=fp32_master")),
    "int8 moments": ("graddiff", (*ADAMW, "optimizer.state=int8")),
}
REBOUND = "stochastic combined"
RESUMED = "combined"


def narrow(shared: bool) -> nn.Module:
    made = sharded_child.model().to(torch.bfloat16)
    return shard(made) if shared else made


def alike(name: str, ranks: int, *, shared: bool, late: bool = False) -> UnlearnStep:
    """The step after steps whose micro-batches are `ranks` copies of one, in one process or one a rank.

    Weights may be shared out as `late` as after the preparation.

    A sum of two equal gradients is exact in every dtype, so that ranks and one process have the bits of one gradient:
    elsewhere bfloat16 rounds each micro-batch's gradients of experts in one process, and their sum over the ranks.
    """
    base, changes = NARROW[name]
    step = UnlearnStep(narrow(shared and not late), recipe(base, *changes, lr=1e-3))
    pair = tuple(side[0] for side in data())
    step.prepare(*([batch] for batch in pair))
    if late:
        shard(step.model)
        step.rebind()
    for _ in range(STEPS):
        made_of(step, [pair] * (1 if shared else ranks))
    return step


def kept(step: UnlearnStep) -> dict[str, int]:
    """Bytes of memory behind the words that a rank has: of the preparation's mask, and of the step's masks."""
    of_mask = {f"mask {name}": part(words) for name, words in step.prepared.mask.packed.items()}
    of_step = {f"step {name}": words for name, words in step.masks.items()}
    return {name: words.untyped_storage().nbytes() for name, words in (of_mask | of_step).items()}


def micro_batches(i: int) -> list:
    """The micro-batches of a step in one process: those of the two ranks."""
    return [batches_of(i, rank, 2) for rank in range(2)]


def begun(made: nn.Module, pairs: list, folder: Path) -> UnlearnStep:
    """The step after the first one of a run, saved."""
    step = sharded_child.step_of(made, RESUMED)
    made_of(step, pairs)
    sharded.save(folder, {"model": made.state_dict(), "step": step.state_dict()})
    return step


def gone_on(made: nn.Module, pairs: list, folder: Path) -> UnlearnStep:
    """The step after the second one of a run that was saved after its first, from other weights."""
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
    step = UnlearnStep(made, sharded_child.recipe_of(RESUMED))
    step.load_state_dict(sharded.load(folder, {"model": made.state_dict()})["step"])
    made_of(step, pairs)
    return step


def resumed(rank: int, folder: Path) -> None:
    """Make the first step of a run, and its second after what ranks and what one process has saved."""
    begun(shard(sharded_child.model()), [batches_of(0, rank, 2)], folder / "of ranks")
    for made_by in ("of ranks", "of one"):
        step = gone_on(shard(sharded_child.model(), "root"), [batches_of(1, rank, 2)], folder / made_by)
        after = weights_of(step)
        if rank == 0:
            save_file(after, folder / f"on {made_by}.safetensors")


def rebound(rank: int, folder: Path) -> dict:
    """Return what a step keeps whose weights are shared out after its preparation, and what it says if that is late."""
    step = alike(REBOUND, 2, shared=True, late=True)
    after = weights_of(step) | masks_of(step)
    if rank == 0:
        save_file(after, folder / f"rebound {REBOUND}.safetensors")
    found: dict = {"kept": kept(step)}
    step = alike(REBOUND, 1, shared=False)
    shard(step.model)
    try:
        step.rebind()
    except ValueError as error:
        found["said"] = str(error)
    return found


def found_by(rank: int, folder: Path) -> dict:
    """Make all steps and write their weights; return what this rank keeps."""
    found: dict = {"rebound": rebound(rank, folder)}
    for name in NARROW:
        step = alike(name, 2, shared=True)
        after = weights_of(step) | masks_of(step)
        if rank == 0:
            save_file(after, folder / f"{name}.safetensors")
        if step.prepared.mask is not None:
            found["kept"] = kept(step)
            masks.save(step.prepared.mask, folder / "mask", step.model)
            masks.save(step.prepared.mask, folder / "official", step.model, "official")
            found["fraction"] = step.prepared.mask.fraction
    resumed(rank, folder)
    return found
