"""expert_wgrad: the grouped weight gradient over a list of trained experts, and its epilogues.

    dW[m] = sum_j grad[grad_rows[j]] (x) input[input_rows[j]]     j over the sorted rows of expert experts[m]

    store, masked store   dW, exactly zero where the mask bit is 0           expert_wgrad
    accumulate            out += dW, into a compact buffer                   expert_wgrad(out=...)
    sgd, adamw            the masked update of `masked_update`, straight     expert_wgrad_sgd_, _adamw_
                          from the float32 dW, which is never stored
    score                 WAGLE's (W - g_r / gamma) * g_f, float32           expert_wgrad_score
    two gradients         <g_i, g_j> for i, j of forget, retain              expert_wgrad_inner

Shapes: grad [R, M], input [R', P], N sorted rows, dW [M_e, M, P]. `expert_offsets` int32 [E + 1] bounds the
rows of each expert; row j itself stands for a missing `grad_rows` or `input_rows`. An expert without rows
has dW exactly zero. Sums run over j in order, in float32 for narrower inputs (one library product per
expert): deterministic. Source: our specification.
"""

import torch
from torch import Tensor

from moe_unlearn import backend
from moe_unlearn.ops.bits import num_words, unpack_bits
from moe_unlearn.ops.masked_update import masked_adamw_, masked_sgd_
from moe_unlearn.ops.weight_score import weight_score


def expert_wgrad(
    grad: Tensor,
    input: Tensor,
    expert_offsets: Tensor,
    *,
    grad_rows: Tensor | None = None,
    input_rows: Tensor | None = None,
    experts: Tensor | None = None,
    mask: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """dW [M_e, M, P] of the listed experts; see the module docstring.

    Args:
        grad, input: [R, M] and [R', P] of one float dtype; expert_offsets: int32 [E + 1].
        grad_rows, input_rows: integer [N], which row of grad and input stands at each sorted position.
        experts: integer [M_e], the trained experts in the order of the result; None is all of them.
        mask: int32 words [M_e, M, ceil(P / 32)]; None keeps everything.
        out: float buffer [M_e, M, P] to add dW to in place; it is returned.
        out_dtype: dtype of a new result, default that of grad.

    No gradient flows. Raises TypeError or ValueError for what does not fit.
    """
    _check(grad, input, expert_offsets, grad_rows, input_rows, experts, mask, out)
    if out is not None:
        _accumulate(grad, input, expert_offsets, out, grad_rows, input_rows, experts, mask, impl)
        return out
    dtype = grad.dtype if out_dtype is None else out_dtype
    return _expert_wgrad(grad, input, expert_offsets, grad_rows, input_rows, experts, mask, dtype, impl)


def expert_wgrad_ref(
    grad: Tensor,
    input: Tensor,
    expert_offsets: Tensor,
    grad_rows: Tensor | None = None,
    input_rows: Tensor | None = None,
    experts: Tensor | None = None,
    mask: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`expert_wgrad` in plain PyTorch, one matrix product per expert; same arguments and shapes."""
    bounds = expert_offsets.tolist()
    listed = range(len(bounds) - 1) if experts is None else experts.tolist()
    products = []
    for e in listed:
        g, x = (
            rows[bounds[e] : bounds[e + 1]] if index is None else rows[index[bounds[e] : bounds[e + 1]].long()]
            for rows, index in ((grad, grad_rows), (input, input_rows))
        )
        # a product over no rows is exactly zero
        products.append(g.t() @ x)
    shape = (0, grad.shape[1], input.shape[1])
    dw = torch.stack(products) if products else grad.new_zeros(shape)
    if mask is not None:
        dw = torch.where(unpack_bits(mask, dw.shape[-1]), dw, 0)
    return dw.to(grad.dtype if out_dtype is None else out_dtype)


def expert_wgrad_sgd_(weight, momentum_buffer, grad, input, expert_offsets, *, experts=None, mask=None,
                      grad_rows=None, input_rows=None, impl="auto", **options) -> None:  # fmt: skip
    """weight[experts] <- masked SGD with dW, in place; `options` are those of `masked_sgd_`.

    momentum_buffer and master are compact, [M_e, M, P]. dW stays in float32 up to the update, which rounds
    it only where torch would (see `masked_update`).
    """
    dw = _wide_wgrad(grad, input, expert_offsets, grad_rows, input_rows, experts, impl)
    masked_sgd_(weight, dw, momentum_buffer, mask, slices=_slices(experts), impl=impl, **options)


def expert_wgrad_adamw_(weight, exp_avg, exp_avg_sq, grad, input, expert_offsets, *, experts=None,
                        mask=None, grad_rows=None, input_rows=None, impl="auto", **options) -> None:  # fmt: skip
    """weight[experts] <- masked AdamW with dW, in place; `options` are those of `masked_adamw_`."""
    dw = _wide_wgrad(grad, input, expert_offsets, grad_rows, input_rows, experts, impl)
    masked_adamw_(weight, dw, exp_avg, exp_avg_sq, mask, slices=_slices(experts), impl=impl, **options)


def expert_wgrad_score(weight, gradients, *, gamma: float, experts=None, impl="auto") -> Tensor:
    """WAGLE's score [M_e, M, P] of weight[experts], float32.

    `gradients` is two dicts of `expert_wgrad` arguments (grad, input, expert_offsets, grad_rows,
    input_rows): of the forget rows, then of the retain rows.
    """
    forget, retain = _two(gradients, experts, impl)
    chosen = weight if experts is None else weight[experts.long()]
    return weight_score(chosen, forget, retain, gamma=gamma, impl=impl)


def expert_wgrad_inner(gradients, *, experts=None, mask=None, impl="auto") -> Tensor:
    """Gram matrix [M_e, 2, 2] float64 of the two masked gradients of each expert, neither of them stored.

    `gradients` as in `expert_wgrad_score`.
    """
    sides = _two(gradients, experts, impl, mask=mask)
    flat = torch.stack([side.double().flatten(1) for side in sides], 1)  # [M_e, 2, M * P]
    return flat @ flat.transpose(1, 2)


def _two(gradients, experts, impl, **keywords) -> list[Tensor]:
    if len(gradients) != 2:
        raise ValueError(f"expected the arguments of two gradients; got {len(gradients)}")
    return [
        expert_wgrad(**side, experts=experts, out_dtype=_wide(side["grad"].dtype), impl=impl, **keywords)
        for side in gradients
    ]


def _wide_wgrad(grad, input, expert_offsets, grad_rows, input_rows, experts, impl):
    return expert_wgrad(
        grad, input, expert_offsets, grad_rows=grad_rows, input_rows=input_rows, experts=experts,
        out_dtype=_wide(grad.dtype), impl=impl,
    )  # fmt: skip


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _slices(experts: Tensor | None) -> Tensor | None:
    return None if experts is None else experts.long()


def _accumulate_ref(grad, input, expert_offsets, out, grad_rows, input_rows, experts, mask) -> None:
    out += expert_wgrad_ref(grad, input, expert_offsets, grad_rows, input_rows, experts, mask, out.dtype)


@torch.library.custom_op("moe_unlearn::expert_wgrad", mutates_args=())
def _expert_wgrad(
    grad: Tensor, input: Tensor, expert_offsets: Tensor, grad_rows: Tensor | None,
    input_rows: Tensor | None, experts: Tensor | None, mask: Tensor | None, out_dtype: torch.dtype,
    impl: str,
) -> Tensor:  # fmt: skip
    kernel = backend.resolve("expert_wgrad", impl, grad)
    return kernel(grad, input, expert_offsets, grad_rows, input_rows, experts, mask, out_dtype)


@_expert_wgrad.register_fake
def _(grad, input, expert_offsets, grad_rows, input_rows, experts, mask, out_dtype, impl):
    count = expert_offsets.shape[0] - 1 if experts is None else experts.shape[0]
    return grad.new_empty(count, grad.shape[1], input.shape[1], dtype=out_dtype)


@torch.library.custom_op("moe_unlearn::expert_wgrad_accumulate", mutates_args={"out"})
def _accumulate(
    grad: Tensor, input: Tensor, expert_offsets: Tensor, out: Tensor, grad_rows: Tensor | None,
    input_rows: Tensor | None, experts: Tensor | None, mask: Tensor | None, impl: str,
) -> None:  # fmt: skip
    kernel = backend.resolve("expert_wgrad.accumulate", impl, grad)
    kernel(grad, input, expert_offsets, out, grad_rows, input_rows, experts, mask)


@_accumulate.register_fake
def _(*arguments):
    return None


backend.register("expert_wgrad", "ref", expert_wgrad_ref)
backend.register("expert_wgrad.accumulate", "ref", _accumulate_ref)


def _check(grad, input, expert_offsets, grad_rows, input_rows, experts, mask, out):
    for name, rows in (("grad", grad), ("input", input)):
        if rows.dim() != 2 or not rows.is_floating_point():
            raise ValueError(f"{name} must be float with two dimensions; got {rows.dtype} {tuple(rows.shape)}")
    if grad.dtype != input.dtype:
        raise TypeError(f"grad and input must have one dtype; got {grad.dtype} and {input.dtype}")
    if expert_offsets.dtype != torch.int32 or expert_offsets.dim() != 1 or len(expert_offsets) < 2:
        raise ValueError(
            f"expert_offsets must be int32 [E + 1]; got {expert_offsets.dtype} {tuple(expert_offsets.shape)}"
        )
    for name, ids in (("grad_rows", grad_rows), ("input_rows", input_rows), ("experts", experts)):
        if ids is not None and (ids.dtype not in (torch.int32, torch.int64) or ids.dim() != 1):
            raise ValueError(f"{name} must be int32 or int64 [n]; got {ids.dtype} {tuple(ids.shape)}")
    count = len(expert_offsets) - 1 if experts is None else len(experts)
    shape = (count, grad.shape[1], input.shape[1])
    if out is not None and (out.shape != shape or not out.is_floating_point()):
        raise ValueError(f"out must be float {list(shape)}; got {out.dtype} {list(out.shape)}")
    words = (*shape[:-1], num_words(shape[-1]))
    if mask is not None and (mask.dtype != torch.int32 or mask.shape != words):
        raise ValueError(f"mask must be int32 words {list(words)}; got {mask.dtype} {list(mask.shape)}")
