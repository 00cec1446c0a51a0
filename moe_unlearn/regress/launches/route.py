"""Define launches of `route` at production shapes, for the ahead-of-time compiler."""

import torch

from moe_unlearn.triton_kernels import route


def _route(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    *,
    dtype: torch.dtype = torch.int64,
    num_groups: int | None = None,
    tilt: torch.dtype | None = None,
) -> None:
    index = torch.empty(num_tokens, top_k, dtype=dtype)
    group = None if num_groups is None else torch.empty(num_tokens, dtype=torch.int64)
    log_tilt = None if tilt is None else torch.empty(num_experts, dtype=tilt)
    log_weight = None if tilt is None else torch.empty(num_tokens)
    route.route(index, num_experts, group, num_groups or 1, log_tilt, log_weight)


CASES = {
    "qwen3": lambda: _route(8192, 128, 8),
    "qwen3 groups, tilt": lambda: _route(8192, 128, 8, num_groups=2, tilt=torch.float32),
    "mixtral, bf16 tilt": lambda: _route(8192, 8, 2, num_groups=2, tilt=torch.bfloat16),
    "512 experts": lambda: _route(8192, 512, 10, dtype=torch.int32, num_groups=3, tilt=torch.float32),
    "a million tokens": lambda: _route(2**20, 512, 16, num_groups=2, tilt=torch.float32),
}
