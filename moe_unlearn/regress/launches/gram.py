"""Define launches of `gram` at production shapes, for the ahead-of-time compiler."""

import torch

from moe_unlearn.triton_kernels.gram import gram, gram_factors

SHAPE = 8, 1536, 2048  # the gate and up projection of 8 of Qwen3-30B-A3B's experts


def _gram(
    m: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    masked: bool = False,
    transposed: bool = False,
    shape: tuple[int, ...] = SHAPE,
) -> None:
    made = [torch.empty(shape, dtype=dtype) for _ in range(m)]
    mask = torch.empty(*shape[:-1], -(-shape[-1] // 32), dtype=torch.int32) if masked else None
    gram([g.transpose(1, 2).contiguous().transpose(1, 2) for g in made] if transposed else made, mask)


def _factors(
    m: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    rows: int = 8192,
    widths: tuple[int, int] = (1536, 2048),
    experts: int = 128,
) -> None:
    row_gradients = [torch.empty(rows, widths[0], dtype=dtype) for _ in range(m)]
    gram_factors(row_gradients, torch.empty(rows, widths[1], dtype=dtype), torch.empty(experts + 1, dtype=torch.int32))


CASES = {
    "two": lambda: _gram(2),
    "two, masked": lambda: _gram(2, masked=True),
    "two, fp32, masked": lambda: _gram(2, dtype=torch.float32, masked=True),
    "two, transposed, masked": lambda: _gram(2, masked=True, transposed=True),
    "two, odd width, masked": lambda: _gram(2, masked=True, shape=(8, 1536, 2041)),
    "three, masked": lambda: _gram(3, masked=True),
    "six, masked": lambda: _gram(6, masked=True),
    "factors of two": lambda: _factors(2),
    "factors of two, fp32": lambda: _factors(2, dtype=torch.float32),
    "factors of three": lambda: _factors(3),
    "factors of five": lambda: _factors(5),
    "factors of two, narrow": lambda: _factors(2, widths=(31, 6)),
}
