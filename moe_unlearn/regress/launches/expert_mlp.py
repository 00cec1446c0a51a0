"""Define static cases of expert_mlp: one layer of Qwen3-30B-A3B with 8 experts, and other layouts."""

from collections.abc import Callable

import torch

from moe_unlearn.triton_kernels import expert_mlp, expert_mlp_backward

HIDDEN, INNER, EXPERTS, TOP_K, TOKENS = 2048, 768, 8, 8, 1024


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def _arguments(
    dtype: torch.dtype, transposed: bool, interleaved: bool, gated: bool, bias: bool, tokens: int, offset: int
) -> tuple[torch.Tensor | None, ...]:
    wide = 2 * INNER if gated else INNER
    rows = _empty(tokens * TOP_K, dtype=torch.int32), _empty(EXPERTS + 1, dtype=torch.int32)
    w1 = _empty(EXPERTS * HIDDEN * wide + offset, dtype=dtype)[offset:].view(EXPERTS, HIDDEN, wide)
    w2 = _empty(EXPERTS, INNER, HIDDEN, dtype=dtype)
    if not transposed:
        w1, w2 = w1.view(EXPERTS, wide, HIDDEN), w2.view(EXPERTS, HIDDEN, INNER)
    biases = (_empty(EXPERTS, wide, dtype=dtype), _empty(EXPERTS, HIDDEN, dtype=dtype)) if bias else (None, None)
    weights = _empty(tokens, TOP_K, dtype=torch.float32)
    return (_empty(tokens, HIDDEN, dtype=dtype), weights, *rows, w1, w2, *biases)


def _case(
    *,
    dtype: torch.dtype = torch.bfloat16,
    transposed: bool = False,
    interleaved: bool = False,
    gated: bool = True,
    bias: bool = False,
    tokens: int = TOKENS,
    offset: int = 0,
    gate: tuple[str, float, float, float] = ("silu", 1.0, float("inf"), 0.0),
    needs: tuple[bool, ...] = (True, True, True, True, False),
) -> Callable[[], None]:
    def launch() -> None:
        made = _arguments(dtype, transposed, interleaved, gated, bias, tokens, offset)
        x, weights, rows, offsets, w1, w2, b1, b2 = made
        options = *gate, transposed, interleaved, gated
        out, z = expert_mlp.expert_mlp(x, weights, rows, offsets, w1, w2, b1, b2, *options)
        expert_mlp_backward.expert_mlp_backward(out, x, weights, rows, offsets, w1, w2, b2, z, *options, list(needs))

    return launch


GPT_OSS = ("silu", 1.702, 7.0, 1.0)

CASES = {
    "qwen3": _case(),
    "qwen3 few rows": _case(tokens=32),
    "gpt-oss": _case(transposed=True, interleaved=True, bias=True, gate=GPT_OSS),
    "transposed": _case(transposed=True),
    "interleaved": _case(interleaved=True),
    "not gated": _case(gated=False, gate=("relu2", 1.0, float("inf"), 0.0)),
    "gelu": _case(gate=("gelu", 1.0, float("inf"), 0.0)),
    "gelu_tanh": _case(gate=("gelu_tanh", 1.0, float("inf"), 0.0)),
    "not aligned": _case(offset=1),
    "not aligned gpt-oss": _case(offset=1, transposed=True, interleaved=True, bias=True, gate=GPT_OSS),
    "float32": _case(dtype=torch.float32),
    "router gradient only": _case(needs=(False, True, False, False, False)),
    "no gradient of x": _case(needs=(False, False, True, True, False)),
    "scaled only": _case(needs=(False, False, False, True, False)),
    "bounded": _case(needs=(True, True, True, True, True)),
    "bounded few rows": _case(tokens=32, needs=(True, True, True, True, True)),
    "bounded gpt-oss": _case(transposed=True, interleaved=True, bias=True, gate=GPT_OSS, needs=(True,) * 5),
    "bounded, lowest layer": _case(needs=(False, False, True, True, True)),
}
