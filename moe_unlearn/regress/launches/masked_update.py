"""Define static cases of masked_update: a gate_up_proj of Qwen3-30B-A3B, cut to 8 experts, 4 of them trained."""

from collections.abc import Callable

import torch

from moe_unlearn.triton_kernels.masked_update import masked_adamw_, masked_sgd_

_SHAPE = (8, 1536, 2048)
_ADAMW = (1e-5, 0.9, 0.95, 1e-8, 0.1)


def _empty(dtype: torch.dtype, experts: int = _SHAPE[0], columns: int = _SHAPE[2]) -> torch.Tensor:
    return torch.empty(experts, _SHAPE[1], columns, dtype=dtype)


def _adamw(
    dtype: torch.dtype,
    state: torch.dtype,
    rounding: str = "nearest",
    *,
    masked: bool = True,
    master: bool = False,
    sliced: bool = False,
    transposed: bool = False,
) -> None:
    experts = 4 if sliced else 8
    param = _empty(dtype)
    masked_adamw_(
        param.transpose(1, 2).contiguous().transpose(1, 2) if transposed else param,
        _empty(dtype, experts),
        _empty(state, experts),
        _empty(state, experts),
        _empty(torch.int32, experts, _SHAPE[2] // 32) if masked else None,
        _empty(torch.float32, experts) if master else None,
        torch.empty(4, dtype=torch.int64) if sliced else None,
        *_ADAMW,
        7,
        rounding,
        0,
        0,
        0,
    )


def _sgd(
    dtype: torch.dtype,
    state: torch.dtype | None,
    rounding: str = "nearest",
    *,
    momentum: float = 0.0,
    decay: float = 0.0,
    nesterov: bool = False,
    step: int = 7,
    master: bool = False,
) -> None:
    buffer = None if state is None else _empty(state)
    words, weights = _empty(torch.int32, columns=_SHAPE[2] // 32), _empty(torch.float32) if master else None
    masked_sgd_(
        _empty(dtype),
        _empty(dtype),
        buffer,
        words,
        weights,
        None,
        1e-3,
        momentum,
        0.0,
        decay,
        nesterov,
        step,
        rounding,
        0,
        0,
        0,
    )


def _elements() -> None:
    """Launch AdamW on slices of a one-dimensional parameter, which are single elements."""
    masked_adamw_(
        torch.empty(8192),
        torch.empty(4096),
        torch.empty(4096),
        torch.empty(4096),
        torch.empty(128, dtype=torch.int32),
        None,
        torch.empty(4096, dtype=torch.int64),
        *_ADAMW,
        7,
        "nearest",
        0,
        0,
        0,
    )


CASES: dict[str, Callable[[], None]] = {
    "adamw bf16": lambda: _adamw(torch.bfloat16, torch.bfloat16),
    "adamw bf16 unmasked": lambda: _adamw(torch.bfloat16, torch.bfloat16, masked=False),
    "adamw bf16 fp32 state": lambda: _adamw(torch.bfloat16, torch.float32),
    "adamw bf16 stochastic": lambda: _adamw(torch.bfloat16, torch.float32, "stochastic"),
    "adamw bf16 stochastic slices": lambda: _adamw(torch.bfloat16, torch.float32, "stochastic", sliced=True),
    "adamw bf16 transposed": lambda: _adamw(torch.bfloat16, torch.float32, transposed=True),
    "adamw bf16 stochastic bf16 state": lambda: _adamw(torch.bfloat16, torch.bfloat16, "stochastic"),
    "adamw bf16 master": lambda: _adamw(torch.bfloat16, torch.float32, master=True),
    "adamw fp32": lambda: _adamw(torch.float32, torch.float32),
    "adamw fp32 elements": _elements,
    "sgd bf16": lambda: _sgd(torch.bfloat16, None),
    "sgd bf16 stochastic": lambda: _sgd(torch.bfloat16, None, "stochastic"),
    "sgd bf16 master": lambda: _sgd(torch.bfloat16, None, master=True),
    "sgd bf16 momentum": lambda: _sgd(torch.bfloat16, torch.float32, momentum=0.9, decay=0.1),
    "sgd bf16 first step": lambda: _sgd(torch.bfloat16, torch.float32, momentum=0.9, decay=0.1, step=1),
    "sgd fp32 nesterov": lambda: _sgd(torch.float32, torch.float32, momentum=0.9, decay=0.1, nesterov=True),
}
