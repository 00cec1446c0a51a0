"""Hidden states in float8 with one scale for each token, for caches of half the bytes that bfloat16 takes.

    x ~ s q        s = max |x| / 448, float32        q = x / s, rounded to e4m3 (ties to even)

Each token is uint8 [H + 4]: the H bytes of q and the four of s. With three bits of mantissa and numbers from 2^-6 on,
below which they are 2^-9 apart, an entry is wrong by

    |s q - x| <= max(2^-4 |x|, 2^-10 s)        (bfloat16: 2^-9 |x|)

What that does to KL follows from the largest error e of a logit of the reference, at most sum_h |W_vh| times that: the
KL of a token moves by at most (KL + 2 / exp(1)) (exp(2 e) - 1), and its gradient with respect to the model's logits by
at most exp(2 e) - 1, as a sum of absolute values. A test holds both. They are bounds, and errors of many entries
cancel: for random states of 2048 entries and a random head of 8192 tokens, whose logits have a standard deviation of 3,
KL at the unchanged model is 3.1e-3 (bfloat16: 1.2e-5), and the sum of its gradient's absolute values 0.062 (0.0039).
That KL is what the stage `kl_floor` measures: MOLLM leaves KL out below ten times as much.

Source: OCP 8-bit floating point (e4m3fn, as torch has it); one scale a token is our specification.
"""

import torch
from torch import Tensor

_LARGEST = 448.0
_SCALE_BYTES = 4


def form(hidden_size: int, reference_dtype: str) -> tuple[torch.dtype, int]:
    """Return the dtype and the entries of a token in a cache of the recipe's `reference_dtype`."""
    if reference_dtype == "float8":
        return torch.uint8, hidden_size + _SCALE_BYTES
    return torch.bfloat16, hidden_size


def coded(states: Tensor, reference_dtype: str) -> Tensor:
    """Return hidden states as a cache of the recipe's `reference_dtype` has them."""
    return packed(states) if reference_dtype == "float8" else states.to(torch.bfloat16)


def packed(states: Tensor) -> Tensor:
    """Pack hidden states [..., H] of any float dtype into uint8 [..., H + 4]; NaN and infinity make the token NaN."""
    states = states.float()
    scale = states.abs().amax(-1, keepdim=True) / _LARGEST
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)  # a token of zeros is no division by 0
    entries = (states / scale).to(torch.float8_e4m3fn)
    return torch.cat([entries.view(torch.uint8), scale.view(torch.uint8)], -1)


def unpacked(rows: Tensor) -> Tensor:
    """Return the hidden states [..., H] of packed ones, float32; states of a float dtype come back as they are."""
    if rows.dtype != torch.uint8:
        return rows
    entries, scale = rows[..., :-_SCALE_BYTES].contiguous(), rows[..., -_SCALE_BYTES:].contiguous()
    return entries.view(torch.float8_e4m3fn).float() * scale.view(torch.float32)
