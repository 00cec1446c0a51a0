"""Define static cases of expert_wgrad: one layer of Qwen3-30B-A3B, cut to 8 experts.

gate_up_proj has gathered inputs, down_proj gathered gradients.
"""

from collections.abc import Callable
from unittest import mock

import torch

from moe_unlearn.triton_kernels import configs
from moe_unlearn.triton_kernels.expert_wgrad import accumulate_, expert_wgrad, inner

_EXPERTS, _HIDDEN, _INNER, _TOKENS, _TOP_K = 8, 2048, 768, 2048, 8
_H200_PROGRAMS = 132


def gate_up(dtype: torch.dtype = torch.bfloat16, bounds: bool = False) -> tuple[torch.Tensor | None, ...]:
    """Return the factors of gate_up_proj, with grad in sorted order and input by token."""
    rows = _TOKENS * _TOP_K
    offsets = torch.empty(_EXPERTS, 2, dtype=torch.int32) if bounds else torch.empty(_EXPERTS + 1, dtype=torch.int32)
    grad = torch.empty(rows, 2 * _INNER, dtype=dtype)
    return grad, torch.empty(_TOKENS, _HIDDEN, dtype=dtype), offsets, None, torch.empty(rows, dtype=torch.int32)


def down(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor | None, ...]:
    """Return the factors of down_proj, with grad by token and input in sorted order."""
    rows, offsets = _TOKENS * _TOP_K, torch.empty(_EXPERTS + 1, dtype=torch.int32)
    grad = torch.empty(_TOKENS, _HIDDEN, dtype=dtype)
    return grad, torch.empty(rows, _INNER, dtype=dtype), offsets, torch.empty(rows, dtype=torch.int32), None


def words(experts: int = _EXPERTS) -> torch.Tensor:
    return torch.empty(experts, 2 * _INNER, _HIDDEN // 32, dtype=torch.int32)


def matrices(dtype: torch.dtype, experts: int = _EXPERTS) -> torch.Tensor:
    return torch.empty(experts, 2 * _INNER, _HIDDEN, dtype=dtype)


def some() -> torch.Tensor:
    return torch.empty(2, dtype=torch.int64)


def _contiguous() -> None:
    grad, _, offsets, _, _ = gate_up()
    assert grad is not None
    expert_wgrad(grad, torch.empty(len(grad), _HIDDEN, dtype=grad.dtype), offsets)


def _split(dtype: torch.dtype) -> None:
    grad, input, offsets, grad_rows, _ = down(dtype)
    one = torch.empty(1, dtype=torch.int64)
    with mock.patch.object(configs, "num_programs", lambda device: _H200_PROGRAMS):
        expert_wgrad(grad, input, offsets, grad_rows, None, one, torch.empty(1, _HIDDEN, _INNER // 32).int())
        out = torch.empty(1, _HIDDEN, _INNER, dtype=torch.float32)
        accumulate_(out, grad, input, offsets, grad_rows, None, one, None)


def _inner(count: int, dtype: torch.dtype = torch.bfloat16, masked: bool = True) -> None:
    inner(*map(list, zip(*[gate_up(dtype, bounds=True)] * count, strict=True)), None, words() if masked else None)


CASES: dict[str, Callable[[], None]] = {
    "store": lambda: expert_wgrad(*gate_up()),
    "store down": lambda: expert_wgrad(*down()),
    "store contiguous": _contiguous,
    "store masked": lambda: expert_wgrad(*gate_up(), None, words()),
    "store fp32": lambda: expert_wgrad(*gate_up(torch.float32), None, words()),
    "accumulate": lambda: accumulate_(matrices(torch.bfloat16), *gate_up(), None, words()),
    "accumulate in fp32": lambda: accumulate_(matrices(torch.float32, 2), *gate_up(), some(), words(2)),
    "split": lambda: _split(torch.bfloat16),
    "split fp32": lambda: _split(torch.float32),
    "inner of one": lambda: _inner(1),
    "inner of three": lambda: _inner(3),
    "inner unmasked": lambda: _inner(2, masked=False),
    "inner fp32": lambda: _inner(2, torch.float32),
}
