"""Rows of open-unlearning's datasets in the form that the engine takes: drawn once and padded on the right."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from moe_unlearn.data import Example, collate, generator


class Drawn(Dataset):
    """Rows that are the same whenever they come, although the dataset draws random numbers from torch for them."""

    def __init__(self, rows: Sequence, seed: int):
        self.rows, self.seed = rows, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        with torch.random.fork_rng([]):
            torch.manual_seed(generator(self.seed, index).initial_seed())
            return self.rows[index]


class Collator:
    """Pads rows {input_ids, labels} of both sides on the right; padding is neither attended nor labelled."""

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, items: Sequence[Mapping]) -> dict[str, dict]:
        out: dict[str, dict] = {}
        for side in ("forget", "retain"):
            rows = [item[side] for item in items]
            if "original" in rows[0]:
                out[side] = {kind: self._padded([row[kind] for row in rows]) for kind in ("original", "alternate")}
            else:
                out[side] = self._padded(rows)
        return out

    def _padded(self, rows: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        ids, labels = ([torch.as_tensor(row[key]).tolist() for row in rows] for key in ("input_ids", "labels"))
        examples = [Example(*pair, 0) for pair in zip(ids, labels, strict=True)]
        return collate(examples, range(len(rows)), pad_id=self.pad_id)
