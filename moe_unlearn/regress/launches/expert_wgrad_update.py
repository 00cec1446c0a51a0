"""Define static cases of expert_wgrad's SGD and AdamW epilogues, on the layer of `launches.expert_wgrad`."""

from collections.abc import Callable

import torch

from moe_unlearn.ops.moments import PACKED, packed_zeros
from moe_unlearn.regress.launches.expert_wgrad import gate_up, matrices, some, words
from moe_unlearn.triton_kernels.expert_wgrad_update import adamw_, sgd_

_BF16, _FP32 = torch.bfloat16, torch.float32


def _moments(dtype: torch.dtype, experts: int) -> torch.Tensor:
    made = matrices(_FP32 if dtype == PACKED else dtype, experts)
    return packed_zeros(tuple(made.shape), made.device) if dtype == PACKED else made


def _adamw(
    dtype: torch.dtype,
    state: torch.dtype,
    rounding: str = "nearest",
    *,
    masked: bool = True,
    master: bool = False,
    listed: bool = True,
) -> None:
    count = 2 if listed else 8
    adamw_(
        matrices(dtype),
        _moments(state, count),
        _moments(state, count),
        matrices(_FP32, count) if master else None,
        *gate_up(dtype),
        some() if listed else None,
        words(count) if masked else None,
        1e-5,
        0.9,
        0.95,
        1e-8,
        0.1,
        7,
        rounding,
        0,
        0,
        0,
    )


def _sgd(
    dtype: torch.dtype,
    state: torch.dtype | None = None,
    rounding: str = "nearest",
    *,
    momentum: float = 0.0,
    decay: float = 0.0,
    nesterov: bool = False,
    step: int = 7,
    master: bool = False,
) -> None:
    buffer = None if state is None else _moments(state, 8)
    sgd_(
        matrices(dtype),
        buffer,
        matrices(_FP32) if master else None,
        *gate_up(dtype),
        None,
        words(),
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


CASES: dict[str, Callable[[], None]] = {
    "adamw bf16": lambda: _adamw(_BF16, _BF16),
    "adamw bf16 fp32 state": lambda: _adamw(_BF16, _FP32),
    "adamw bf16 unmasked, all experts": lambda: _adamw(_BF16, _FP32, masked=False, listed=False),
    "adamw bf16 stochastic": lambda: _adamw(_BF16, _FP32, "stochastic"),
    "adamw bf16 master": lambda: _adamw(_BF16, _FP32, master=True),
    "adamw bf16 packed": lambda: _adamw(_BF16, PACKED, "stochastic"),
    "adamw bf16 packed master": lambda: _adamw(_BF16, PACKED, master=True),
    "adamw fp32 packed": lambda: _adamw(_FP32, PACKED),
    "adamw fp32": lambda: _adamw(_FP32, _FP32),
    "sgd bf16": lambda: _sgd(_BF16),
    "sgd bf16 stochastic": lambda: _sgd(_BF16, rounding="stochastic"),
    "sgd bf16 master": lambda: _sgd(_BF16, master=True),
    "sgd bf16 momentum": lambda: _sgd(_BF16, _FP32, momentum=0.9, decay=0.1),
    "sgd bf16 first step": lambda: _sgd(_BF16, _FP32, momentum=0.9, decay=0.1, step=1),
    "sgd bf16 packed": lambda: _sgd(_BF16, PACKED, "stochastic", momentum=0.9, decay=0.1),
    "sgd fp32 nesterov": lambda: _sgd(_FP32, _FP32, momentum=0.9, decay=0.1, nesterov=True),
}
