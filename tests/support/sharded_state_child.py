"""One of two ranks under FSDP2, where what matters is what a rank keeps: bits of rounding, masks, states, numerics."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from moe_unlearn import masks
from moe_unlearn.sharding import part
from moe_unlearn.step import UnlearnStep
from tests.support import sharded_child
from tests.support.sharded_child import ADAMW, FLOOR, STEPS, main, masks_of, shard, weights_of
from tests.support.steps import data, made_of, recipe

# cases in bfloat16
NARROW = {
    "stochastic": ("graddiff", ADAMW),
    "stochastic combined": ("combined", (*ADAMW, *FLOOR)),
    "masters": ("graddiff", (*ADAMW, "optimizer.numerics=fp32_master")),
}


def narrow(shared: bool) -> nn.Module:
    made = sharded_child.model().to(torch.bfloat16)
    return shard(made) if shared else made


def alike(name: str, ranks: int, *, shared: bool) -> UnlearnStep:
    """The step after steps whose micro-batches are `ranks` copies of one, in one process or one a rank.

    A sum of two equal gradients is exact in every dtype, so that ranks and one process have the bits of one gradient:
    elsewhere bfloat16 rounds each micro-batch's gradients of experts in one process, and their sum over the ranks.
    """
    base, changes = NARROW[name]
    step = UnlearnStep(narrow(shared), recipe(base, *changes, lr=1e-3))
    pair = tuple(side[0] for side in data())
    step.prepare(*([batch] for batch in pair))
    for _ in range(STEPS):
        made_of(step, [pair] * (1 if shared else ranks))
    return step


def kept(step: UnlearnStep) -> dict[str, int]:
    """Bytes of memory behind the words that a rank has: of the preparation's mask, and of the step's masks."""
    of_mask = {f"mask {name}": part(words) for name, words in step.prepared.mask.packed.items()}
    of_step = {f"step {name}": words for name, words in step.masks.items()}
    return {name: words.untyped_storage().nbytes() for name, words in (of_mask | of_step).items()}


def all_of(rank: int, folder: Path) -> dict:
    found: dict = {}
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
    return found


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), all_of)
