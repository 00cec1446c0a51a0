"""Define launches of `retain_weights` at production shapes, for the ahead-of-time compiler."""

import math

import torch

from moe_unlearn.triton_kernels import retain_weights


def _both(num_tokens: int, num_members: int, *, cap: float = math.inf) -> None:
    words = torch.empty(num_tokens, (num_members + 31) // 32, dtype=torch.int32)
    tilt = torch.empty(num_members, dtype=torch.float64)
    retain_weights.retain_weights(words, tilt, 0.25, cap)
    retain_weights.moments(words, tilt, 0.25, cap)


CASES = {
    "one word": lambda: _both(65536, 24),
    "all experts of qwen3": lambda: _both(65536, 128, cap=4.0),
}
