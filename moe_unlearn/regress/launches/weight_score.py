"""Define static cases of weight_score: one layer's gate_up_proj of Qwen3-30B-A3B, cut to 8 experts."""

import torch

from moe_unlearn.triton_kernels.weight_score import score_histogram, score_mask


def _terms(dtype: torch.dtype, *shape: int) -> list[torch.Tensor]:
    return [torch.empty(shape, dtype=dtype) for _ in range(3)]


def _transposed() -> list[torch.Tensor]:
    return [t.transpose(1, 2) for t in _terms(torch.bfloat16, 8, 2048, 1536)]


def _all(*terms: torch.Tensor) -> None:
    score_histogram(*terms, 0.5, 0, 0)
    score_histogram(*terms, 0.5, 1, 0x3D00)
    score_mask(*terms, 0.5, 0x3D000000, 3)
    score_mask(*terms, 0.5, 0x3D000000, 0)


CASES = {
    "bf16": lambda: _all(*_terms(torch.bfloat16, 8, 1536, 2048)),
    "fp32": lambda: _all(*_terms(torch.float32, 8, 1536, 2048)),
    "bf16 rows padded": lambda: _all(*_terms(torch.bfloat16, 64, 1001)),
    "bf16 transposed": lambda: _all(*_transposed()),
}
