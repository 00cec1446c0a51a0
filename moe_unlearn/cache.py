"""Values cached per row of the data: reference log-probs and hidden states, token weights.

A row is found by its `index` or, without one, by its content (input ids and labels where the attention
mask is 1), so that the same document is found whatever its batch and padding. Values are stored for the
attended positions only.
"""

import hashlib

import torch
from torch import Tensor


def row_keys(batch: dict[str, Tensor]) -> list[str]:
    """One key per row of a batch: its `index` if there is one, else a 128-bit hash of its content."""
    if "index" in batch:
        return [f"index {i}" for i in batch["index"].tolist()]
    attended = batch["attention_mask"].bool().cpu()
    keys = []
    for ids, labels, mask in zip(batch["input_ids"].cpu(), batch["labels"].cpu(), attended, strict=True):
        content = torch.stack([ids[mask], labels[mask]]).to(torch.int64).contiguous()
        keys.append(hashlib.blake2b(content.numpy().tobytes(), digest_size=16).hexdigest())
    return keys


class RowCache:
    """Per-row tensors [length, ...] under the keys of `row_keys`; lives on the CPU."""

    def __init__(self, what: str):
        self.what = what
        self._rows: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(row.numel() * row.element_size() for row in self._rows.values())

    def put(self, batch: dict[str, Tensor], values: Tensor) -> None:
        """Store `values` [B, S, ...] of a batch; a row seen again must have the same length."""
        for key, row, mask in zip(row_keys(batch), values, batch["attention_mask"].bool(), strict=True):
            row = row[mask].detach().cpu()
            if key in self._rows and len(self._rows[key]) != len(row):
                raise ValueError(
                    f"{self.what}: two rows share the key {key!r} but have {len(self._rows[key])} and "
                    f"{len(row)} tokens; `index` must name each row once"
                )
            self._rows[key] = row

    def get(self, batch: dict[str, Tensor]) -> Tensor:
        """Values [B, S, ...] on the batch's device, zero where nothing is attended; KeyError if unknown."""
        attended = batch["attention_mask"].bool()
        keys = row_keys(batch)
        missing = [i for i, key in enumerate(keys) if key not in self._rows]
        if missing:
            raise KeyError(
                f"{self.what}: rows {missing} of this batch were not seen by prepare(), which saw "
                f"{len(self)} rows; prepare on every document the step will meet"
            )
        first = self._rows[keys[0]]
        out = first.new_zeros(*attended.shape, *first.shape[1:], device=attended.device)
        for i, key in enumerate(keys):
            row = self._rows[key]
            if len(row) != int(attended[i].sum()):
                raise ValueError(
                    f"{self.what}: row {i} has {int(attended[i].sum())} tokens but {len(row)} were cached "
                    f"under its key {key!r}"
                )
            out[i, attended[i]] = row.to(out.device)
        return out

    def state_dict(self) -> dict:
        """Keys, lengths and one concatenated tensor."""
        rows = list(self._rows.values())
        return {
            "keys": list(self._rows),
            "lengths": [len(row) for row in rows],
            "values": torch.cat(rows) if rows else torch.empty(0),
        }

    def load_state_dict(self, state: dict) -> None:
        """Replace the contents by those of `state_dict`."""
        rows = state["values"].split(state["lengths"]) if state["lengths"] else []
        self._rows = dict(zip(state["keys"], (row.clone() for row in rows), strict=True))
