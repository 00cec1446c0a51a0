"""What `stats`, `mask` and `run` ask of a model, and the two sides of the first two in batches beside it."""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial

from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn import data
from moe_unlearn.config import Data
from moe_unlearn.data.pairs import carry_loss
from moe_unlearn.experts import enable
from moe_unlearn.lazy import each
from moe_unlearn.model.admissible import check_values
from moe_unlearn.model.batches import Batch, beside


def batches_of(
    options: argparse.Namespace,
    model: nn.Module,
    tokenizer: Tokenizer,
    sets: Mapping[str, Sequence[data.Example]],
    *,
    planned: bool = False,
) -> dict[str, Sequence[Batch]]:
    """Return the sides in batches on the model's device, whose tokens are checked when they are asked for.

    For a model that is `planned` alone they stay on the host; whether it keeps packed rows apart can only be seen with
    its weights.
    """
    if options.packing and not planned:
        data.check_packing(model, rows=2)
    packing = (options.max_length or Data.max_length) if options.packing else None

    def admitted(side: str, batch: Batch) -> Batch:
        check_values(batch, side, model, alone=False, moved=False)  # on the host, where reading waits for nothing
        return batch if planned else beside(batch, model)

    made = {}
    for side, examples in sets.items():
        if not carry_loss(examples):
            raise ValueError(
                f"the {side} set carries no loss: all its labels are -100: give texts longer than their prompts"
            )
        own = data.batches(examples, options.batch_size, pad_id=data.pad_token_id(tokenizer), packing=packing)
        made[side] = each(own, partial(admitted, side))
    return made


def require_moe(model: nn.Module) -> None:
    """Raise the error of `enable`, which names the families that work, for other models; leave the model as it is.

    Raises ValueError for a model that is spread over several devices.
    """
    enable(model).disable()
    if len(devices := {str(p.device) for p in model.parameters()}) > 1:
        raise ValueError(
            f"expected a model on one device; got one on {', '.join(sorted(devices))}: --device auto-map is for eval "
            "and alternates, and --mesh shares the weights of a run out"
        )
