"""gram: computes the inner products of m gradient sets over a whole model.

    G[i, j] = sum over parameters p of < mask_p * g_i,p , mask_p * g_j,p >

A gradient set is a list of tensors, one per parameter; None stands for zero. Masks are packed words (layout:
`ops.bits`) and apply before the products: masked elements may hold anything, NaN included.

The factor ("ghost") form gives the same for grouped weight gradients G_i[e] = sum_{n in e} dy_i[n] (x) x[n]
without storing them. It takes n_e^2 (P + m^2 M) instead of n_e m M P products per expert, which pays for experts
with few rows.

    G[i, j] = sum_e sum_{n, n' in e} (x[n] . x[n']) (dy_i[n] . dy_j[n'])

Worked example, one parameter, g_0 = (1, 2), g_1 = (3, 0), no mask: G = [[5, 3], [3, 9]].

Products and sums are float64, so that products of float32 and narrower gradients are exact: the common descent
direction needs small differences of large entries. The result is deterministic: blocks, parameters and experts are
added in order. No gradient flows. Source: our specification; the factor identity is that of ghost clipping in
differential privacy.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moe_unlearn import backend, native
from moe_unlearn.ops.bits import unpack_bits, words_shape
from moe_unlearn.ops.checks import check_offsets
from moe_unlearn.ops.custom import custom_op
from moe_unlearn.ops.legal import legal_offsets

BLOCK = 1 << 20  # elements widened to float64 at a time


def gram(
    gradients: Sequence[Sequence[Tensor | None]],
    *,
    masks: Sequence[Tensor | None] | None = None,
    impl: str = "auto",
) -> Tensor:
    """Compute G [m, m] float64, exactly symmetric, on the device of the first gradient; see the module docstring.

    Args:
        gradients: m >= 1 lists of one length; at each position float tensors of one shape, dtype and
            device, or None.
        masks: a list of that length, int32 words [..., ceil(n / 32)] or None at each position.

    A gradient that is not finite makes its entries of G not finite and raises nothing. Raises TypeError or
    ValueError, naming the position, if lengths, shapes, dtypes, devices or masks do not fit together.
    """
    _check(gradients, masks)
    m = len(gradients)
    first = next((g for tensors in gradients for g in tensors if g is not None), None)
    total = torch.zeros(m, m, dtype=torch.float64, device=None if first is None else first.device)
    for position, tensors in enumerate(zip(*gradients, strict=True)):
        present = [i for i, g in enumerate(tensors) if g is not None]
        if present:
            mask = None if masks is None else masks[position]
            part: Tensor = _gram([tensors[i] for i in present], mask, impl).to(total.device)
            index = torch.tensor(present, device=total.device)
            total[index[:, None], index] += part
    return total


def gram_ref(gradients: list[Tensor], mask: Tensor | None = None) -> Tensor:
    """Compute G [m, m] float64 of m tensors of one shape, in plain PyTorch."""
    total = gradients[0].new_zeros(len(gradients), len(gradients), dtype=torch.float64)
    for block in _blocks(gradients, mask):
        total = total + block @ block.t()
    return total.tril() + total.tril(-1).t()


def _blocks(gradients: list[Tensor], mask: Tensor | None) -> Iterator[Tensor]:
    """Yield the masked gradients as float64 [m, elements], whole rows of at most about BLOCK elements at a time."""
    width = gradients[0].shape[-1] if gradients[0].dim() else 1
    rows = [g.reshape(-1, width) for g in gradients] if width else []
    height = max(BLOCK // max(width, 1), 1)
    for start in range(0, len(rows[0]) if rows else 0, height):
        block = torch.stack([r[start : start + height].to(torch.float64) for r in rows])
        if mask is not None:
            words = mask.reshape(-1, mask.shape[-1])[start : start + height]
            block = torch.where(unpack_bits(words, width), block, 0.0)
        yield block.flatten(1)


def gram_factors(
    row_gradients: Sequence[Tensor], inputs: Tensor, expert_offsets: Tensor, *, impl: str = "auto"
) -> Tensor:
    """Compute G [m, m] float64 of grouped weight gradients from their factors; see the module docstring.

    Args:
        row_gradients: m >= 1 tensors dy_i [R, M] of one dtype, rows sorted by expert. A row that an objective does
            not use is zero.
        inputs: x [R, P] of the same dtype, the rows' inputs, shared by the objectives.
        expert_offsets: int32 or int64 [E + 1], exclusive prefix sums as `route` returns them; rows behind
            the last offset take no part.

    Masks within a weight cannot be applied to factors: use `gram` on the gradients themselves. Raises ValueError for
    operands that do not fit and for offsets that do not rise from 0 to at most R.
    """
    _check_factors(row_gradients, inputs, expert_offsets)
    expert_offsets = legal_offsets(expert_offsets, len(inputs))
    total: Tensor = _gram_factors(list(row_gradients), inputs, expert_offsets, impl)
    return total


def gram_factors_ref(row_gradients: list[Tensor], inputs: Tensor, expert_offsets: Tensor) -> Tensor:
    """Compute `gram_factors` in plain PyTorch."""
    m = len(row_gradients)
    total = inputs.new_zeros(m, m, dtype=torch.float64)
    bounds = expert_offsets.tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        x = inputs[start:end].to(torch.float64)
        dy = torch.stack([g[start:end].to(torch.float64) for g in row_gradients])
        weighted = (x @ x.t()) @ dy
        total = total + weighted.flatten(1) @ dy.flatten(1).t()
    return total.tril() + total.tril(-1).t()


@custom_op("moe_unlearn::gram")
def _gram(gradients: list[Tensor], mask: Tensor | None, impl: str) -> Tensor:
    total: Tensor = backend.resolve("gram", impl, gradients[0])(gradients, mask)
    return total


@_gram.register_fake
def _(gradients: list[Tensor], mask: Tensor | None, impl: str) -> Tensor:
    return gradients[0].new_empty(len(gradients), len(gradients), dtype=torch.float64)


@custom_op("moe_unlearn::gram_factors")
def _gram_factors(row_gradients: list[Tensor], inputs: Tensor, expert_offsets: Tensor, impl: str) -> Tensor:
    check_offsets(expert_offsets, len(inputs))
    total: Tensor = backend.resolve("gram.factors", impl, inputs)(row_gradients, inputs, expert_offsets)
    return total


@_gram_factors.register_fake
def _(row_gradients: list[Tensor], inputs: Tensor, expert_offsets: Tensor, impl: str) -> Tensor:
    return inputs.new_empty(len(row_gradients), len(row_gradients), dtype=torch.float64)


def _gram_native(gradients: list[Tensor], mask: Tensor | None) -> Tensor:
    if mask is None and all(g.is_contiguous() for g in gradients):
        gradients = [g.view(-1) for g in gradients]  # one row: whole words whatever the last dimension
    kernel = torch.ops.moe_unlearn_native.gram
    total: Tensor = kernel(gradients, None if mask is None else mask.contiguous())
    return total


def _gram_factors_native(row_gradients: list[Tensor], inputs: Tensor, expert_offsets: Tensor) -> Tensor:
    total: Tensor = torch.ops.moe_unlearn_native.gram_factors(row_gradients, inputs, expert_offsets.tolist())
    return total


backend.register("gram", "ref", gram_ref)
backend.register("gram.factors", "ref", gram_factors_ref)
native.register("gram", _gram_native)
native.register("gram.factors", _gram_factors_native)
backend.register("gram", "triton", "moe_unlearn.triton_kernels.gram:gram")
backend.register("gram.factors", "triton", "moe_unlearn.triton_kernels.gram:gram_factors")


def _check(gradients: Sequence[Sequence[Tensor | None]], masks: Sequence[Tensor | None] | None) -> None:
    lengths = [len(tensors) for tensors in gradients]
    if not lengths or len(set(lengths)) > 1:
        raise ValueError(f"expected at least one gradient set, all of one length; got lengths {lengths}")
    if masks is not None and len(masks) != lengths[0]:
        raise ValueError(f"expected one mask or None for each of {lengths[0]} parameters; got {len(masks)}")
    for position, tensors in enumerate(zip(*gradients, strict=True)):
        present = [g for g in tensors if g is not None]
        if not present:
            continue
        if not present[0].is_floating_point():
            raise TypeError(f"parameter {position}: gradients must be floating point; got {present[0].dtype}")
        kinds = {(g.dtype, tuple(g.shape), str(g.device)) for g in present}
        if len(kinds) > 1:
            raise ValueError(
                f"parameter {position}: expected one dtype, shape and device; got {sorted(map(str, kinds))}"
            )
        mask, shape = None if masks is None else masks[position], present[0].shape
        if mask is not None:
            words = words_shape(shape)
            if mask.dtype != torch.int32 or mask.shape != words or mask.device != present[0].device:
                raise ValueError(
                    f"parameter {position}: mask must be int32 words {list(words)} on {present[0].device}; "
                    f"got {mask.dtype} {list(mask.shape)} on {mask.device}"
                )


def _check_factors(row_gradients: Sequence[Tensor], inputs: Tensor, expert_offsets: Tensor) -> None:
    if not row_gradients:
        raise ValueError("expected at least one block of row gradients; got none")
    if inputs.dim() != 2 or not inputs.is_floating_point():
        raise ValueError(f"inputs must be float [R, P]; got {inputs.dtype} {list(inputs.shape)}")
    for i, g in enumerate(row_gradients):
        if g.shape != row_gradients[0].shape or g.dim() != 2 or len(g) != len(inputs):
            raise ValueError(f"row_gradients[{i}] must be [R, M] with R = {len(inputs)} and one M; got {list(g.shape)}")
        if g.dtype != inputs.dtype or g.device != inputs.device:
            raise ValueError(
                f"row_gradients[{i}] must be {inputs.dtype} on {inputs.device} like inputs; got {g.dtype} on {g.device}"
            )
    if expert_offsets.dtype not in (torch.int32, torch.int64) or expert_offsets.dim() != 1 or not len(expert_offsets):
        raise ValueError(
            f"expert_offsets must be int32 or int64 [E + 1]; got {expert_offsets.dtype} {list(expert_offsets.shape)}"
        )
    if expert_offsets.device != inputs.device:
        raise ValueError(f"expert_offsets must be on {inputs.device} like inputs; got {expert_offsets.device}")
