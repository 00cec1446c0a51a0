"""gram: inner products of m gradient sets over a whole model.

    G[i, j] = sum over parameters p of <g_i,p * mask_p, g_j,p * mask_p>

A gradient set is a list of tensors, one per parameter, None meaning zero; masks are packed words (layout:
`ops.bits`) or None, and apply before the products. Nothing of the size of the model is made: parameters are
visited one after the other. The products of one parameter are summed in at least float32, parameters are
added in order in float64: deterministic.

The factor ("ghost") form computes the same for gradients G_i = sum_n dy_i[n] (x) x_i[n] of grouped rows
without making them, which pays for experts with few rows:

    <G_i, G_j> = sum_e sum_{n, n' in e} (dy_i[n] . dy_j[n']) (x_i[n] . x_j[n'])

Source: our specification; the factor identity is known from ghost clipping in differential privacy.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_unlearn import backend
from moe_unlearn.ops.bits import num_words, unpack_bits


def gram(
    gradients: Sequence[Sequence[Tensor | None]],
    *,
    masks: Sequence[Tensor | None] | None = None,
    impl: str = "auto",
) -> Tensor:
    """G [m, m] float64, symmetric, on the device of the gradients; see the module docstring.

    Args:
        gradients: m lists of one length; at each position tensors of one shape and dtype, or None.
        masks: a list of that length of int32 words [..., ceil(n / 32)] or None; None masks nothing.

    Raises ValueError if lengths, shapes or masks do not fit together.
    """
    _check(gradients, masks)
    total = None
    for position, tensors in enumerate(zip(*gradients, strict=True)):
        present = [i for i, g in enumerate(tensors) if g is not None]
        if not present:
            continue
        mask = None if masks is None else masks[position]
        part = _gram([tensors[i] for i in present], mask, impl)
        if total is None:
            total = torch.zeros(len(gradients), len(gradients), dtype=torch.float64, device=part.device)
        index = torch.tensor(present, device=part.device)
        total[index[:, None], index] += part
    return torch.zeros(len(gradients), len(gradients), dtype=torch.float64) if total is None else total


def gram_ref(gradients: list[Tensor], mask: Tensor | None = None) -> Tensor:
    """Inner products [m, m] float64 of m tensors of one shape, masked."""
    wide = torch.promote_types(gradients[0].dtype, torch.float32)
    rows = []
    for g in gradients:
        if mask is not None:
            g = torch.where(unpack_bits(mask, g.shape[-1] if g.dim() else 1).view(g.shape), g, 0)
        rows.append(g.flatten().to(wide))
    # one dot product for each pair, so that G is exactly symmetric
    products = {(i, j): torch.dot(rows[i], rows[j]) for i in range(len(rows)) for j in range(i + 1)}
    return torch.stack(
        [torch.stack([products[max(i, j), min(i, j)] for j in range(len(rows))]) for i in range(len(rows))]
    ).double()


def gram_factors(
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    expert_offsets: Sequence[Tensor],
    *,
    experts: Tensor | None = None,
) -> Tensor:
    """G [m, m] float64 from factors: grads[i] [N_i, M], inputs[i] [N_i, P], expert_offsets[i] int [E + 1].

    Set i has its own sorted rows; `experts` restricts the sum to these experts. Cost per expert and pair:
    n_i n_j (M + P) instead of (n_i + n_j) M P.
    """
    if not len(grads) == len(inputs) == len(expert_offsets) > 0:
        raise ValueError(
            f"expected as many grads as inputs and expert_offsets; got {len(grads)}, {len(inputs)}, "
            f"{len(expert_offsets)}"
        )
    m = len(grads)
    bounds = [offsets.tolist() for offsets in expert_offsets]
    listed = range(len(bounds[0]) - 1) if experts is None else experts.tolist()
    total = torch.zeros(m, m, dtype=torch.float64, device=grads[0].device)
    wide = torch.promote_types(grads[0].dtype, torch.float32)
    for e in listed:
        parts = [
            (g[b[e] : b[e + 1]].to(wide), x[b[e] : b[e + 1]].to(wide))
            for g, x, b in zip(grads, inputs, bounds, strict=True)
        ]
        for i in range(m):
            for j in range(i + 1):
                (gi, xi), (gj, xj) = parts[i], parts[j]
                value = ((gi @ gj.t()) * (xi @ xj.t())).sum().double()
                total[i, j] += value
                if i != j:
                    total[j, i] += value
    return total


@torch.library.custom_op("moe_unlearn::gram", mutates_args=())
def _gram(gradients: list[Tensor], mask: Tensor | None, impl: str) -> Tensor:
    return backend.resolve("gram", impl, gradients[0])(gradients, mask)


@_gram.register_fake
def _(gradients, mask, impl):
    return gradients[0].new_empty(len(gradients), len(gradients), dtype=torch.float64)


backend.register("gram", "ref", gram_ref)


def _check(gradients, masks):
    lengths = {len(g) for g in gradients}
    if len(lengths) != 1:
        raise ValueError(f"expected gradient sets of one length; got lengths {[len(g) for g in gradients]}")
    if masks is not None and len(masks) not in lengths:
        raise ValueError(f"expected one mask or None for each of {lengths.pop()} parameters; got {len(masks)}")
    for position, tensors in enumerate(zip(*gradients, strict=True)):
        present = [g for g in tensors if g is not None]
        if len({(g.shape, g.dtype, g.device) for g in present}) > 1:
            kinds = [(g.dtype, tuple(g.shape), str(g.device)) for g in present]
            raise ValueError(f"parameter {position}: expected one dtype, shape and device; got {kinds}")
        mask = None if masks is None or not present else masks[position]
        if mask is not None:
            shape = present[0].shape
            words = (*shape[:-1], num_words(shape[-1])) if shape else (1,)
            if mask.dtype != torch.int32 or mask.shape != words:
                raise ValueError(
                    f"parameter {position}: mask must be int32 words {list(words)}; "
                    f"got {mask.dtype} {list(mask.shape)}"
                )
