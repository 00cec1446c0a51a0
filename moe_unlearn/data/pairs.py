"""Pairs of a forget and a retain example for trainers that draw both at every step."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from moe_unlearn.data.tokenize import Example, collate, generator


class ForgetRetainDataset(Dataset):
    """Item i is the i-th forget example with a randomly drawn retain example.

    The partners are a function of `seed` and the epoch alone: every epoch (`set_epoch`) walks through a fresh
    permutation of the retain examples, so none comes twice before all have come. Raises ValueError if either
    side is empty.
    """

    def __init__(self, forget: Sequence[Example], retain: Sequence[Example], *, seed: int = 0):
        for name, side in (("forget", forget), ("retain", retain)):
            if not len(side):
                raise ValueError(f"expected at least one {name} example; the {name} set is empty")
        self.forget, self.retain, self.seed = forget, retain, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the partners of this epoch."""
        draw, rows = generator(self.seed, epoch), []
        while len(rows) < len(self.forget):
            rows += torch.randperm(len(self.retain), generator=draw).tolist()
        self.partners = rows[: len(self.forget)]

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, i: int) -> dict[str, tuple[Example, int]]:
        i = range(len(self))[i]  # IndexError past the end, and negative positions as in a list
        partner = self.partners[i]
        return {"forget": (self.forget[i], i), "retain": (self.retain[partner], partner)}


class PairCollator:
    """Collates items of `ForgetRetainDataset` to {"forget": batch, "retain": batch}, each with `index`."""

    def __init__(self, pad_id: int = 0):
        self.pad_id = pad_id

    def __call__(self, items: Sequence[dict[str, tuple[Example, int]]]) -> dict[str, dict[str, Tensor]]:
        sides = {}
        for side in ("forget", "retain"):
            examples, index = zip(*(item[side] for item in items), strict=True)
            sides[side] = collate(examples, index, pad_id=self.pad_id)
        return sides


def overlap(forget: Sequence[Example], retain: Sequence[Example]) -> int:
    """How many forget examples stand in the retain set too, token by token."""
    kept = {tuple(e.input_ids) for e in retain}
    return sum(tuple(e.input_ids) in kept for e in forget)
