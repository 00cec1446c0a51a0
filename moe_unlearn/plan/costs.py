"""Cost of an operation: its floating-point operations, the bytes it moves and what its kernel allocates inside.

Matrix products count two operations per multiply and add; element-wise work counts as bytes only. Routed rows
are assumed to be spread evenly, so that M_e of E experts see N M_e / E of N rows.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from moe_unlearn import backend
from moe_unlearn.ops.token_loss import _DEFAULT_ROWS, _TEMPORARIES, IGNORED, TILED_KINDS, WORKSPACE_BYTES

_MATRIX_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "dot", "mv")


def kernel(function) -> str:
    """Return the name under which an operation is counted: our operations by name, torch's by kind."""
    namespace, _, name = function._schema.name.partition("::")
    if namespace == "moe_unlearn":
        return name
    if name in _MATRIX_PRODUCTS:
        return "matmul"
    return "attention" if "attention" in name else "other"


def nbytes(tensor: Tensor) -> int:
    """Return the bytes of `tensor` that an operation touches; elements that expansion repeats count once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def arguments(function, args: tuple, kwargs: Mapping) -> dict:
    """Return an operation's arguments by name, defaults included."""
    declared = function._schema.arguments
    defaults = {argument.name: argument.default_value for argument in declared if argument.has_default_value()}
    return defaults | dict(zip((argument.name for argument in declared), args, strict=False)) | dict(kwargs)


def flops(function, args: tuple, kwargs: Mapping, out) -> int:
    """Count the floating-point operations of the matrix products in one operation; 0 if it has none."""
    own = _FLOPS.get(function._schema.name)
    if own is not None:
        return int(own(arguments(function, args, kwargs)))
    formula = flop_registry.get(function.overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def workspace(function, args: tuple, kwargs: Mapping) -> int:
    """Return the most bytes that the kernel of one operation holds at a time of memory allocated inside it."""
    part, own = _WORKSPACE.get(function._schema.name, (None, None))
    if own is None:
        return 0
    named = arguments(function, args, kwargs)
    like = next(v for v in named.values() if isinstance(v, Tensor) and v.is_floating_point())
    return int(own(part and backend.choose(part, named["impl"], like.device.type, like.dtype), named))


def _experts_share(experts: Tensor | None, offsets: Tensor) -> float:
    total = len(offsets) - (offsets.dim() == 1)
    return 1.0 if experts is None else len(experts) / max(total, 1)


def _expert_mlp(a: dict) -> float:
    weights = a["gate_up_proj"].numel() + a["down_proj"].numel()
    return 2 * a["top_k_weights"].numel() * weights / len(a["down_proj"])


def _expert_mlp_backward(a: dict) -> float:
    need_x, *need_others, _, _ = a["needs"]
    weights = a["gate_up_proj"].numel() * need_x + a["down_proj"].numel() * (need_x or any(need_others))
    return 2 * a["top_k_weights"].numel() * weights / len(a["down_proj"])


def _wgrad(a: dict) -> float:
    grad, input = a["grad"], a["input"]
    rows = len(grad if a["grad_rows"] is None else a["grad_rows"])
    return 2 * rows * grad.shape[1] * input.shape[1] * _experts_share(a["experts"], a["expert_offsets"])


def _wgrad_sides(a: dict) -> float:
    sides = [_wgrad({key: a[f"{key}_{side}"] for key in ("grad", "input", "expert_offsets", "grad_rows")} |
                    {"experts": a["experts"]}) for side in "fr"]  # fmt: skip
    return sum(sides)


def _wgrad_inner(a: dict) -> float:
    one = zip(a["grads"], a["inputs"], a["expert_offsets"], a["grad_rows"], strict=True)
    names = ("grad", "input", "expert_offsets", "grad_rows")
    products = sum(_wgrad(dict(zip(names, side, strict=True)) | {"experts": a["experts"]}) for side in one)
    m, like = len(a["grads"]), a["grads"][0]
    experts = len(a["expert_offsets"][0]) if a["experts"] is None else len(a["experts"])
    return products + m * (m + 1) * experts * like.shape[1] * a["inputs"][0].shape[1]


def _counted_rows(labels: Tensor) -> int:
    """Count the rows for which a loss computes logits; all rows where the labels are fakes without values."""
    return len(labels) if isinstance(labels, FakeTensor) else int((labels != IGNORED).sum())


def _sides(a: dict) -> int:
    """Return the number of sets of logits: the model's, and a reference's if there is one."""
    return 1 if a.get("ref_hidden") is None else 2


def _token_loss(a: dict) -> float:
    keep, products = bool(a["keep"]) and a["kind"] not in TILED_KINDS, _sides(a)
    return 2 * _counted_rows(a["labels"]) * a["head"].numel() * (products + keep)


def _token_loss_backward(a: dict) -> float:
    # the slope of a logit margin needs the logits only where there is a softcap
    logits = 0 if a["kind"] == "logit_margin" and a["softcap"] is None else _sides(a)
    kept = a["direction"].numel() > 0
    products = (logits if a["needs_head"] or not kept else 0) + a["needs_head"] + (a["needs_hidden"] and not kept)
    return 2 * _counted_rows(a["labels"]) * a["head"].numel() * products


def _token_loss_head(a: dict) -> float:
    rows, group = _counted_rows(a["labels"]), min(_FORWARD_WIDTH, len(a["head"]))
    # one kept row of a tile spans all tokens, in float32 unless products take pairs
    tile_row = math.ceil(rows / 32) * 32 * (2 if _pairs(a) else 4)
    kept = (group * a["head"].shape[1] + a["spare"].shape[1] * a["spare"].shape[2]) * a["head"].itemsize / group
    again = max(0.0, 1 - kept / max(tile_row, 1))
    return 2 * rows * a["head"].numel() * (a["needs_head"] + again)


def _gram(a: dict) -> float:
    m = len(a["gradients"])
    return m * (m + 1) * a["gradients"][0].numel()


def _gram_factors(a: dict) -> float:
    rows, m = a["inputs"].shape[0], len(a["row_gradients"])
    per_expert = rows / max(len(a["expert_offsets"]) - 1, 1)
    return 2 * rows * per_expert * (a["inputs"].shape[1] + m**2 * a["row_gradients"][0].shape[1])


def _attention(a: dict) -> float:
    return sdpa_flop_count(a["query"].shape, a["key"].shape, a["value"].shape)


def _attention_backward(a: dict) -> float:
    # the scores are computed again, then the gradients of the operands of both products
    return 2.5 * _attention(a)


_CPU_ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
_FLOPS = {
    "moe_unlearn::expert_mlp": _expert_mlp,
    "moe_unlearn::expert_mlp_backward": _expert_mlp_backward,
    "moe_unlearn::expert_wgrad": _wgrad,
    "moe_unlearn::expert_wgrad_accumulate": _wgrad,
    "moe_unlearn::expert_wgrad_sgd": _wgrad,
    "moe_unlearn::expert_wgrad_adamw": _wgrad,
    "moe_unlearn::expert_wgrad_score": _wgrad_sides,
    "moe_unlearn::expert_wgrad_inner": _wgrad_inner,
    "moe_unlearn::token_loss": _token_loss,
    "moe_unlearn::token_loss_backward": _token_loss_backward,
    "moe_unlearn::token_loss_head_": _token_loss_head,
    "moe_unlearn::gram": _gram,
    "moe_unlearn::gram_factors": _gram_factors,
    _CPU_ATTENTION: _attention,
    f"{_CPU_ATTENTION}_backward": _attention_backward,
}

# Memory that kernels allocate inside, from their own block sizes. Only what goes through torch's allocator counts: the
# C++ kernels keep some scratch per thread, of the size of a processor cache, outside of it.
_FORWARD_TILE, _FORWARD_WIDTH = 128, 512  # csrc/cpu/token_loss_matrices.h: block, width
_BACKWARD_TILE, _BACKWARD_WIDTH = 512, 256  # backward_block, backward_width


def _expert_mlp_space(impl: str, a: dict) -> int:
    """Return the workspace of `expert_mlp` in bytes.

    Every implementation holds the rows of the output [N, H] before they are added up; triton also activations [N, I].
    """
    x, rows = a["hidden_states"], a["top_k_weights"].numel()
    inner = a["down_proj"].numel() // len(a["down_proj"]) // x.shape[1]
    wide = a["gate_up_proj"].numel() // len(a["gate_up_proj"]) // x.shape[1]
    return rows * x.itemsize * {"cpu": x.shape[1], "triton": x.shape[1] + inner}.get(impl, 4 * x.shape[1] + wide)


def _expert_mlp_backward_space(impl: str, a: dict) -> int:
    """Return the workspace of `expert_mlp`'s backward in bytes: rows of d hidden_states [N, H], where it is needed."""
    x, z = a["hidden_states"], a["z"]
    if impl in ("cpu", "triton"):
        return a["needs"][0] * len(z) * x.shape[1] * x.itemsize
    return 4 * len(z) * (x.shape[1] + 4 * z.shape[1])


def _token_loss_space(impl: str, a: dict) -> int:
    """Return the workspace of `token_loss` in bytes.

    It holds tiles of logits, copies of hidden states, and copies of head entries where the head is not float32.
    """
    rows, (vocabulary, hidden), sides = _counted_rows(a["labels"]), a["head"].shape, _sides(a)
    impl = "ref" if a["kind"] in TILED_KINDS else impl
    if impl == "triton":
        return sides * len(a["labels"]) * hidden * a["hidden"].itemsize
    if impl == "ref":
        return _tiled_space(rows, vocabulary, hidden, sides)
    dense = not _pairs(a)
    copied = 0 if a["head"].dtype == torch.float32 else _FORWARD_WIDTH
    keys = dense * sides * (_FORWARD_TILE + copied) * hidden + (1 + dense) * bool(a["keep"]) * _FORWARD_TILE * hidden
    tasks = min(torch.get_num_threads(), max(1, math.ceil(rows / _FORWARD_TILE)))
    return 4 * tasks * (keys + sides * _FORWARD_WIDTH * _FORWARD_TILE) + 8 * rows


def _token_loss_backward_space(impl: str, a: dict) -> int:
    """Return the workspace of `token_loss`'s backward in bytes; it has the hidden states' gradient in float32."""
    rows, (vocabulary, hidden), sides = _counted_rows(a["labels"]), a["head"].shape, _sides(a)
    tokens, impl = len(a["labels"]), "ref" if a["kind"] in TILED_KINDS else impl
    if impl == "triton":
        gathered = sides * tokens * hidden * a["hidden"].itemsize
        # a row of dl/dz takes 32 KiB, less from 16,384 tokens on, and never more than the whole vocabulary
        row = min(2**15, max(2**29 // max(tokens, 1), 1024 * a["hidden"].itemsize), vocabulary * a["hidden"].itemsize)
        return gathered + a["needs_hidden"] * 4 * tokens * hidden + tokens * row
    if impl == "ref":
        return _tiled_space(rows, vocabulary, hidden, sides) + 4 * rows * hidden
    space = 0 if a["hidden"].dtype == torch.float32 else 4 * a["hidden"].numel()
    return max(space + 8 * rows + 4 * tokens, _token_loss_head_space(impl, a))


def _token_loss_head_space(impl: str, a: dict) -> int:
    """Return the workspace for the head's gradient in bytes: tiles of logits, sums, and copies as in the forward."""
    rows, (vocabulary, hidden), sides = _counted_rows(a["labels"]), a["head"].shape, _sides(a)
    if not (a["needs_head"] or a["needs_bias"]):
        return 0
    dense = not _pairs(a)
    copied = 0 if a["head"].dtype == torch.float32 else dense * _BACKWARD_WIDTH
    tile = sides * (copied * hidden + _BACKWARD_WIDTH * _BACKWARD_TILE)
    tile += a["needs_head"] * (1 + dense) * _BACKWARD_WIDTH * hidden
    tasks = min(torch.get_num_threads(), math.ceil(vocabulary / _FORWARD_WIDTH))
    return 4 * (tasks * tile + dense * sides * rows * hidden) + 8 * rows + 4 * len(a["labels"])


def _pairs(a: dict) -> bool:
    """Return whether products take bfloat16 in pairs, whose operands are packed outside of torch's allocator."""
    return (
        a["hidden"].dtype == a["head"].dtype == torch.bfloat16
        and a["hidden"].shape[1] % 32 == 0
        and torch.cpu._is_avx512_bf16_supported()
    )


def _tiled_space(rows: int, vocabulary: int, hidden: int, sides: int) -> int:
    tile = min(WORKSPACE_BYTES // _TEMPORARIES, 4 * min(rows, _DEFAULT_ROWS) * vocabulary)
    return (1 + 2 * sides) * tile + 4 * hidden * (sides * rows + vocabulary)


def _attention_space(impl: str, a: dict) -> int:
    """Return the workspace of torch's CPU flash attention in bytes: a tile of scores and its sums for each thread."""
    queries, width = a["query"].shape[-2:]
    rows = min(queries, 256 if queries >= 768 else 64 if queries >= 192 else 32)
    keys = min(a["key"].shape[-2], 512)
    scores = rows * keys * (4 if a["query"].dtype == torch.float32 else 6)
    return torch.get_num_threads() * (scores + 4 * rows * (2 + width))


def _attention_backward_space(impl: str, a: dict) -> int:
    queries = a["query"].shape[-2]
    rows = min(queries, 256 if queries >= 768 else 64 if queries >= 192 else 32)
    keys = min(a["key"].shape[-2], 512)
    return torch.get_num_threads() * 2 * rows * keys * (4 if a["query"].dtype == torch.float32 else 6)


_WORKSPACE = {
    "moe_unlearn::expert_mlp": ("expert_mlp", _expert_mlp_space),
    "moe_unlearn::expert_mlp_backward": ("expert_mlp.backward", _expert_mlp_backward_space),
    "moe_unlearn::token_loss": ("token_loss", _token_loss_space),
    "moe_unlearn::token_loss_backward": ("token_loss.backward", _token_loss_backward_space),
    "moe_unlearn::token_loss_head_": (None, _token_loss_head_space),
    _CPU_ATTENTION: (None, _attention_space),
    f"{_CPU_ATTENTION}_backward": (None, _attention_backward_space),
}
