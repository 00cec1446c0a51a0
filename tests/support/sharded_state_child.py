"""One of two ranks under FSDP2, where what matters is what a rank keeps: bits of rounding, masks, states, numerics."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

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


def alike(name: str, ranks: int, *, shared: bool) -> dict:
    """Weights and masks after steps whose micro-batches are `ranks` copies of one, in one process or one a rank.

    A sum of two equal gradients is exact in every dtype, so that ranks and one process have the bits of one gradient:
    elsewhere bfloat16 rounds each micro-batch's gradients of experts in one process, and their sum over the ranks.
    """
    base, changes = NARROW[name]
    step = UnlearnStep(narrow(shared), recipe(base, *changes, lr=1e-3))
    pair = tuple(side[0] for side in data())
    step.prepare(*([batch] for batch in pair))
    for _ in range(STEPS):
        made_of(step, [pair] * (1 if shared else ranks))
    return weights_of(step) | masks_of(step)


def all_of(rank: int, folder: Path) -> dict:
    for name in NARROW:
        after = alike(name, 2, shared=True)
        if rank == 0:
            save_file(after, folder / f"{name}.safetensors")
    return {}


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), all_of)
