"""Define static cases of masked_update with packed moments: those of masked_update's shape."""

from collections.abc import Callable

import torch

from moe_unlearn.ops.moments import packed_zeros
from moe_unlearn.triton_kernels.masked_update import masked_adamw_, masked_sgd_

_SHAPE = (4, 1536, 2048)  # the slices that train, of 8
_UPDATE = (7, "stochastic", 0, 0, 0)


def _operands(*, master: bool = False) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Return (parameter and gradient, mask, master and slices)."""
    words, slices = torch.empty(*_SHAPE[:2], _SHAPE[2] // 32, dtype=torch.int32), torch.empty(4, dtype=torch.int64)
    tensors = [torch.empty(8, *_SHAPE[1:], dtype=torch.bfloat16), torch.empty(_SHAPE, dtype=torch.bfloat16)]
    return tensors, [words, torch.empty(_SHAPE) if master else None, slices]


def _moments() -> torch.Tensor:
    return packed_zeros(_SHAPE, torch.device("cpu"))


def _adamw(*, master: bool = False) -> None:
    tensors, others = _operands(master=master)
    update = (7, "nearest", 0, 0, 0) if master else _UPDATE
    masked_adamw_(*tensors, _moments(), _moments(), *others, 1e-5, 0.9, 0.95, 1e-8, 0.1, *update)


def _sgd() -> None:
    tensors, others = _operands()
    masked_sgd_(*tensors, _moments(), *others, 1e-3, 0.9, 0.0, 0.1, False, *_UPDATE)


CASES: dict[str, Callable[[], None]] = {
    "adamw bf16 stochastic": _adamw,
    "adamw bf16 master": lambda: _adamw(master=True),
    "sgd bf16 momentum stochastic": _sgd,
}
