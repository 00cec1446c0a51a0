"""Cost of any operation that a dry run meets: the ops' own tables (`ops.costs`), torch's counts and its CPU attention.

A count covers floating-point operations, the bytes of the operands, and what a kernel allocates inside.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from moe_unlearn import backend
from moe_unlearn.ops.costs import expert_mlp, expert_wgrad, gram, token_loss
from moe_unlearn.ops.costs.cost import Cost

_MATRIX_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "dot", "mv")


def kernel(function: OpOverload) -> str:
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


def arguments(function: OpOverload, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return an operation's arguments by name, defaults included."""
    declared = function._schema.arguments
    defaults = {argument.name: argument.default_value for argument in declared if argument.has_default_value()}
    return defaults | dict(zip((argument.name for argument in declared), args, strict=False)) | dict(kwargs)


def flops(function: OpOverload, args: tuple, kwargs: Mapping[str, Any], out: object) -> int:
    """Count the floating-point operations of the matrix products in one operation; 0 if it has none."""
    own = _COSTS.get(function._schema.name)
    if own is not None:
        return int(own.flops(**arguments(function, args, kwargs)))
    formula = flop_registry.get(function.overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def products(function: OpOverload, args: tuple, kwargs: Mapping[str, Any]) -> float:
    """Count the matrix products of an operation whose products are of one size; 0 for every other operation."""
    own = _COSTS.get(function._schema.name)
    if own is None or own.product is None:
        return 0.0
    named = arguments(function, args, kwargs)
    count: float = own.flops(**named) / max(own.product(**named), 1.0)
    return count


def workspace(function: OpOverload, args: tuple, kwargs: Mapping[str, Any]) -> int:
    """Return the most bytes that the kernel of one operation holds at a time of memory allocated inside it."""
    own = _COSTS.get(function._schema.name)
    if own is None or own.workspace is None:
        return 0
    named = arguments(function, args, kwargs)
    if own.part:
        like = next(v for v in named.values() if isinstance(v, Tensor) and v.is_floating_point())
        named["impl"] = backend.choose(own.part, named["impl"], like.device.type, like.dtype)
    return int(own.workspace(**named))


def _attention(*, query: Tensor, key: Tensor, value: Tensor, **_: object) -> int:
    count: int = sdpa_flop_count(query.shape, key.shape, value.shape)
    return count


def _attention_backward(**operands: Any) -> float:
    # the scores are computed again, then the gradients of the operands of both products
    return 2.5 * _attention(**operands)


def _attention_space(*, query: Tensor, key: Tensor, **_: object) -> int:
    """Return the workspace of torch's CPU flash attention in bytes: a tile of scores and its sums for each thread."""
    rows, keys = _attention_tile(query, key)
    scores = rows * keys * (4 if query.dtype == torch.float32 else 6)
    return torch.get_num_threads() * (scores + 4 * rows * (2 + query.shape[-1]))


def _attention_backward_space(*, query: Tensor, key: Tensor, **_: object) -> int:
    rows, keys = _attention_tile(query, key)
    return torch.get_num_threads() * 2 * rows * keys * (4 if query.dtype == torch.float32 else 6)


def _attention_tile(query: Tensor, key: Tensor) -> tuple[int, int]:
    """Return the rows and keys of a tile of torch's CPU flash attention."""
    queries = query.shape[-2]
    return min(queries, 256 if queries >= 768 else 64 if queries >= 192 else 32), min(key.shape[-2], 512)


_OPS = expert_mlp, expert_wgrad, gram, token_loss  # the ops with products or workspace
_CPU_ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
_COSTS = {f"moe_unlearn::{name}": cost for op in _OPS for name, cost in op.COSTS.items()} | {
    _CPU_ATTENTION: Cost(_attention, _attention_space),
    f"{_CPU_ATTENTION}_backward": Cost(_attention_backward, _attention_backward_space),
}
