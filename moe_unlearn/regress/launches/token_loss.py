"""Define launches of `token_loss` at production shapes, for the ahead-of-time compiler."""

import torch

from moe_unlearn.triton_kernels.token_loss import token_loss
from moe_unlearn.triton_kernels.token_loss_backward import token_loss_backward
from moe_unlearn.triton_kernels.token_loss_kept import token_loss_kept

QWEN3, OLMOE = (151_936, 2048), (50_304, 2048)


def _both(
    kind: str,
    shape: tuple[int, int] = QWEN3,
    tokens: int = 8192,
    *,
    dtype: torch.dtype = torch.bfloat16,
    trained_head: bool = False,
    bias: bool = False,
    weights: bool = True,
    other_head: str = "",
    keeps: bool = False,
    scale_and_softcap: tuple[float, float | None] = (1.0, None),
) -> None:
    vocabulary, width = shape
    hidden = torch.empty(tokens, width, dtype=dtype)
    head = (
        torch.empty(width, vocabulary, dtype=dtype).t()
        if other_head == "transposed"
        else torch.empty(shape, dtype=dtype)
    )
    labels, token_weights = torch.empty(tokens, dtype=torch.int64), torch.empty(tokens) if weights else None
    reference = (
        torch.empty_like(hidden) if kind == "kl" else None,
        torch.empty_like(head) if other_head == "of the reference" else None,
    )
    column = torch.empty(vocabulary, dtype=dtype) if bias else None
    arguments = hidden, head, labels, column, token_weights, *reference
    options = kind, *scale_and_softcap, True, None
    if keeps:
        _, *softmax, direction = token_loss_kept(*arguments, *options, True, trained_head)[:5]
    else:
        (_, *softmax), direction = token_loss(*arguments, *options), None
    needs = True, trained_head, bias and trained_head
    token_loss_backward(torch.empty(tokens), *arguments, *softmax, *options, *needs, direction)


CASES = {
    "nll, qwen3": lambda: _both("nll"),
    "nll, head trained": lambda: _both("nll", trained_head=True, weights=False),
    "uce, softcap": lambda: _both("uce", scale_and_softcap=(0.5, 30.0)),
    "kl, qwen3": lambda: _both("kl", trained_head=True),
    "kl, head of its own": lambda: _both("kl", other_head="of the reference"),
    "nll, bias": lambda: _both("nll", OLMOE, trained_head=True, bias=True),
    "nll, few rows": lambda: _both("nll", OLMOE, tokens=64),
    "nll, head transposed": lambda: _both("nll", OLMOE, other_head="transposed"),
    "nll, kept, qwen3": lambda: _both("nll", keeps=True),
    "nll, kept, bias and head trained": lambda: _both("nll", OLMOE, trained_head=True, bias=True, keeps=True),
    "uce, kept, softcap": lambda: _both("uce", scale_and_softcap=(0.5, 30.0), keeps=True),
    "nll, kept, few rows": lambda: _both("nll", OLMOE, tokens=64, keeps=True),
    "nll, kept, head transposed": lambda: _both("nll", OLMOE, other_head="transposed", keeps=True),
    "nll, kept, fp32": lambda: _both("nll", OLMOE, tokens=2048, dtype=torch.float32, keeps=True),
    "kl, kept, qwen3": lambda: _both("kl", keeps=True),
    "kl, kept, head of its own and softcap": lambda: _both(
        "kl", other_head="of the reference", keeps=True, scale_and_softcap=(0.5, 30.0)
    ),
    "kl, kept, fp32": lambda: _both("kl", OLMOE, tokens=2048, dtype=torch.float32, keeps=True),
    "nll, fp16": lambda: _both("nll", OLMOE, dtype=torch.float16, trained_head=True),
    "nll, fp32": lambda: _both("nll", OLMOE, tokens=2048, dtype=torch.float32, trained_head=True),
    "kl, fp32": lambda: _both("kl", OLMOE, tokens=2048, dtype=torch.float32),
}
