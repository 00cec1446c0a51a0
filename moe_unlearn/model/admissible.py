"""Checks what a batch's tensors hold, before a model reads them: their devices and the range of their numbers.

Deterministic. Source: our specification; transformers takes a mask of any dtype, and a token is attended where it is
not 0. Masks to be added to scores, 0 and a large negative number, mean the opposite and are refused.
"""

from typing import Any

import numpy as np
from torch import Tensor, nn

from moe_unlearn.model.batches import Batch
from moe_unlearn.ops.token_loss import IGNORED

_READ = ("input_ids", "labels", "position_ids", "attention_mask", "state_mask")
Numbers = np.ndarray[Any, np.dtype[Any]]


def check_values(batch: Batch, side: str, model: nn.Module, *, alone: bool = True, moved: bool = True) -> None:
    """Raise ValueError, which names the key and the number, for a `checked` batch that the model cannot take.

    Tokens and labels are in the vocabulary, a label may be -100; positions are not negative; masks are finite and not
    negative; all is where the model's input goes, if it has `moved` there; and some position carries a loss, unless the
    batch is not `alone` but one of a set. A batch on a GPU is read, before anything is under way there.
    """
    what, device = f"the {side} batch", next(model.parameters()).device
    for key, value in batch.items():
        if moved and value.device != device:
            raise ValueError(f"{what}: {key} must be on {device}, as the model; got {value.device}")
    read = {key: _read(value) for key, value in batch.items() if key.removeprefix("idk_") in _READ}
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]  # of transformers
    # of a plan's rank the weight itself has this rank's rows alone
    vocabulary = getattr(embeddings, "num_embeddings", len(embeddings.weight))
    for key, numbers in read.items():
        _check_range(f"{what}: {key}", key.removeprefix("idk_"), numbers, vocabulary)
    attended, labelled = read["attention_mask"] != 0, read["labels"] != IGNORED
    carries = attended[:, :-1] & labelled[:, 1:], attended & read.get("state_mask", False)
    if alone and not any(positions.any() for positions in carries):
        raise ValueError(f"{what} carries no loss: expected an attended token before a label that is not {IGNORED}")


def _read(value: Tensor) -> Numbers:
    return (value.float() if value.is_floating_point() else value).cpu().numpy()


def _check_range(what: str, key: str, numbers: Numbers, vocabulary: int) -> None:
    if key == "labels":
        numbers = numbers[numbers != IGNORED]
    if not numbers.size:
        return
    low, high = numbers.min(), numbers.max()
    if key == "attention_mask" and not 0 <= low <= high < np.inf:
        raise ValueError(f"{what} must be 0 for padding, else positive and finite; got {low} to {high}")
    if key == "position_ids" and low < 0:
        raise ValueError(f"{what} must count from 0; got {low}")
    if key in ("input_ids", "labels") and not 0 <= low <= high < vocabulary:
        other = "" if key == "input_ids" else f", or {IGNORED} for none"
        raise ValueError(
            f"{what} must be tokens of the model's vocabulary, in [0, {vocabulary}){other}; got "
            f"{low if low < 0 else high}: is the tokenizer the model's own?"
        )
