"""The models and meshes whose plans are compared with measurements."""

from pathlib import Path
from typing import NamedTuple

import torch

from moe_unlearn.config import Recipe
from tests.support.batches import random_batch
from tests.support.models import TINY_MODELS

VOCAB, RANKS = 256, 4


class Case(NamedTuple):
    """A model on a mesh: torch's own fully_shard, or with `native` what transformers makes of it."""

    family: str
    mesh: str
    native: bool = False
    changes: dict = {}


CASES = {
    "olmoe, 2 ranks": Case("olmoe", "fsdp=2"),
    "qwen3_moe, 4 ranks": Case("qwen3_moe", "fsdp=4"),
    "uneven numbers of experts": Case("qwen3_moe", "fsdp=4", changes={"num_experts": 6}),
    "experts on 2 x 2 ranks": Case("olmoe", "fsdp=4,ep=2", native=True),
    "experts on 4 ranks": Case("qwen3_moe", "fsdp=4,ep=4", native=True),
}


def model_of(name: str) -> torch.nn.Module:
    """Weights that take more memory than what a step computes from its tokens."""
    case = CASES[name]
    torch.manual_seed(0)
    return TINY_MODELS[case.family](VOCAB, hidden_size=128, **case.changes).eval()


def save(folder: Path) -> None:
    """Save the models that ranks load from `folder`, under the names of their cases."""
    for name, case in CASES.items():
        if case.native:
            model_of(name).save_pretrained(folder / name)


def recipe() -> Recipe:
    return Recipe.load("graddiff", ["optimizer.lr=1e-4", "optimizer.name=adamw"])


def batches() -> tuple[dict, dict]:
    """Return what every rank has; the same on all, so that as many tokens come to a rank as go."""
    return random_batch(VOCAB, 2, 16, seed=1), random_batch(VOCAB, 2, 16, seed=2)
