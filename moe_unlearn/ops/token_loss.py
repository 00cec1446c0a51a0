"""token_loss: hidden states x head -> per-token losses with per-token weights; no T x V tensor exists.

    z_t = cap(scale * (W h_t + b)),  cap(x) = softcap * tanh(x / softcap), the identity without softcap
    p_t = softmax(z_t),  loss[t] = w_t * l_t

    nll    l_t = -log p_t[y_t]                                       dl/dz = p - onehot(y)
    uce    l_t = -log(1 - p_t[y_t] / 2), in [0, log 2]               dl/dz = -(e^l - 1) (p - onehot(y))
    kl     l_t = sum_v q_t[v] (log q_t[v] - log p_t[v])              dl/dz = p - q

T tokens, H hidden, V vocabulary: hidden_states h [T, H], lm_head W [V, H], labels y [T]. q is the softmax of reference
hidden states under the same head, or a frozen copy of it; no gradient flows into q. In `uce`, e^l - 1 = p / (2 - p), so
the gradient at the target logit is p (1 - p) / (2 - p).

A row whose label is -100 or whose weight is 0 has loss exactly 0 and gradient exactly 0, whatever it holds, and is
dropped before the matrix product. (Where the weights themselves need a gradient, which is l_t, only the label drops a
row.) Worked example: labels [5, -100, 2, 7] with weights [1, 3, 0, 2] multiply rows 0 and 3 alone.

The rest goes in tiles of rows x vocabulary whose logits, with the temporaries beside them, fit a workspace of 32 MiB.
Logits and softmax are float32, float64 if an input is; the forward keeps a few numbers per row and the backward
recomputes each tile from the saved normaliser of the softmax. Gradients are summed in float32 and rounded once.

Precision: the normaliser is kept as the pair (max z, sum exp(z - max z)), so a confident token keeps its
small loss and large logits lose nothing; kl of a row to itself is exactly 0, and q = 0 adds exactly 0.

Deterministic: tiles in a fixed order, no atomics. Source: nll and kl are standard; uce with its division by 2 was read
in the FedOSD code of MOLLM's authors, its use in MOLLM is our reconstruction; tiling and dropping are ours.
"""

import torch
from torch import Tensor

from moe_unlearn import backend, native

KINDS = ("nll", "uce", "kl")
IGNORED = -100
WORKSPACE_BYTES = 32 * 2**20
_TEMPORARIES = 4  # tiles of logits alive at a time: z, p, and for kl the two of the reference
_DEFAULT_ROWS = 4096
_KEPT = "token_loss.kept"


def token_loss(
    hidden_states: Tensor,
    lm_head: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    kind: str = "nll",
    ref_hidden_states: Tensor | None = None,
    ref_lm_head: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_rows: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """loss [T], float32 (float64 for float64); differentiable in hidden_states, lm_head, bias and weights.

    Args:
        hidden_states, lm_head, bias: any float dtypes; [T, H], [V, H] and [V].
        labels: int64 [T], -100 is ignored; for "kl" they only say which rows count.
        token_weights: float [T]; None is 1.
        kind: "nll", "uce" or "kl".
        ref_hidden_states: [T, H], required by "kl"; ref_lm_head: [V, H] where the reference had another
            head than `lm_head`. Both for "kl" only.
        logit_scale, logit_softcap: as in the formula.
        chunk_rows: rows per tile, None for a default; the vocabulary side of a tile follows from it.

    Raises TypeError or ValueError for a dtype, shape, device, option or label that does not fit. There is
    no double backward; `token_loss_ref` has one.
    """
    _check(hidden_states, lm_head, labels, bias, token_weights, kind, ref_hidden_states, ref_lm_head,
           logit_softcap, chunk_rows)  # fmt: skip
    drop_zero_weights = token_weights is not None and not token_weights.requires_grad
    return _token_loss(
        hidden_states, lm_head, labels, bias, token_weights, ref_hidden_states, ref_lm_head, kind,
        float(logit_scale), None if logit_softcap is None else float(logit_softcap), drop_zero_weights,
        chunk_rows, impl, _trained(hidden_states), _trained(lm_head, bias),
    )[0]  # fmt: skip


def token_loss_ref(
    hidden_states, lm_head, labels, *, bias=None, token_weights=None, kind="nll", ref_hidden_states=None,
    ref_lm_head=None, logit_scale=1.0, logit_softcap=None,
) -> Tensor:  # fmt: skip
    """`token_loss` in plain PyTorch, all logits at once, differentiable by autograd."""
    dtype = _wide(hidden_states, lm_head)
    drop_zero_weights = token_weights is not None and not token_weights.requires_grad
    rows = _counted(labels, token_weights, drop_zero_weights)
    z = _logits(hidden_states[rows].to(dtype), lm_head, bias, logit_scale, logit_softcap)
    log_p = torch.log_softmax(z, 1)
    if kind == "kl":
        head = lm_head if ref_lm_head is None else ref_lm_head
        z_ref = _logits(ref_hidden_states[rows].to(dtype), head, bias, logit_scale, logit_softcap).detach()
        log_q = torch.log_softmax(z_ref, 1)
        q = log_q.exp()
        loss = torch.where(q == 0, 0, q * (log_q - log_p)).sum(1)
    else:
        log_py = log_p.gather(1, labels[rows, None]).squeeze(1)
        loss = -log_py if kind == "nll" else -torch.log1p(-log_py.exp() / 2)
    if token_weights is not None:
        loss = token_weights[rows].to(dtype) * loss
    return torch.zeros(labels.shape, dtype=dtype, device=labels.device).index_put((rows,), loss)


def _trained(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _wide(*tensors: Tensor) -> torch.dtype:
    wide = any(t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def _counted(labels: Tensor, token_weights: Tensor | None, drop_zero_weights: bool) -> Tensor:
    """Indices of the rows that are computed, ascending."""
    counted = labels != IGNORED
    if drop_zero_weights:
        counted = counted & (token_weights != 0)
    return counted.nonzero().squeeze(1)


def _logits(h: Tensor, head: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Logits [n, v] in the dtype of `h` under `head` [v, H], any dtype."""
    z = h @ head.to(h.dtype).t()
    if bias is not None:
        z = z + bias.to(h.dtype)
    if scale != 1.0:
        z = z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


@torch.library.custom_op("moe_unlearn::token_loss", mutates_args=())
def _token_loss(
    hidden: Tensor, head: Tensor, labels: Tensor, bias: Tensor | None, weights: Tensor | None,
    ref_hidden: Tensor | None, ref_head: Tensor | None, kind: str, scale: float, softcap: float | None,
    drop_zero_weights: bool, chunk_rows: int | None, impl: str, keep: bool = False, keep_head: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss [T], l [T], the softmax's max z and sum exp(z - max z) [2, T], those of the reference [2, T], dl/dh, ...).

    All are 0 in dropped rows. dl/dh [T, H] is for the backward, empty unless `keep` and the kernel can keep it; the
    last three are for the gradients of head and bias, by `keep_head`.
    """
    arguments = (hidden, head, labels, bias, weights, ref_hidden, ref_head, kind, scale, softcap,
                 drop_zero_weights, chunk_rows)  # fmt: skip
    kept = _kept(hidden, impl, keep or keep_head)
    kernel = backend.resolve(kept or "token_loss", impl, hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        none = [hidden.new_empty(0) for _ in range(4)]
        return kernel(*arguments, keep, keep_head) if kept else (*kernel(*arguments), *none)


def _kept(hidden: Tensor, impl: str, keep: bool) -> str:
    """The part that keeps dl/dh, if the implementation chosen has it."""
    chosen = backend.choose("token_loss", impl, hidden.device.type, hidden.dtype) if keep else None
    return _KEPT if backend.has(_KEPT, chosen, hidden.device.type) else ""


@_token_loss.register_fake
def _(hidden, head, labels, bias, weights, ref_hidden, ref_head, kind, scale, softcap, drop, chunk_rows, impl,
      keep=False, keep_head=False):  # fmt: skip
    loss = hidden.new_empty(labels.shape, dtype=_wide(hidden, head))
    pair = loss.new_empty(2, *labels.shape)
    kept = [hidden.new_empty(0) for _ in range(4)]
    if _kept(hidden, impl, keep or keep_head):
        room = backend.resolve("token_loss.room", impl, hidden)
        kept = room(hidden, head, labels, bias, ref_hidden, ref_head, kind, keep, keep_head)
    return loss, torch.empty_like(loss), pair, torch.empty_like(pair), *kept


@torch.library.custom_op("moe_unlearn::token_loss_backward", mutates_args=())
def _token_loss_backward(
    grad: Tensor, hidden: Tensor, head: Tensor, labels: Tensor, bias: Tensor | None, weights: Tensor | None,
    ref_hidden: Tensor | None, ref_head: Tensor | None, value: Tensor, norm: Tensor, ref_norm: Tensor,
    direction: Tensor, kind: str, scale: float, softcap: float | None, drop_zero_weights: bool, chunk_rows: int | None,
    needs_hidden: bool, needs_head: bool, needs_bias: bool, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, head and bias; an empty tensor for one that is not needed."""
    kernel = backend.resolve("token_loss.backward", impl, hidden)
    kept = {"direction": direction} if direction.numel() else {}
    with torch.autocast(hidden.device.type, enabled=False):
        return kernel(grad, hidden, head, labels, bias, weights, ref_hidden, ref_head, value, norm,
                      ref_norm, kind, scale, softcap, drop_zero_weights, chunk_rows, needs_hidden,
                      needs_head, needs_bias, **kept)  # fmt: skip


@_token_loss_backward.register_fake
def _(grad, hidden, head, labels, bias, weights, ref_hidden, ref_head, value, norm, ref_norm, direction, kind, scale,
      softcap, drop_zero_weights, chunk_rows, needs_hidden, needs_head, needs_bias, impl):  # fmt: skip
    grad_bias = bias.new_empty(bias.shape) if needs_bias else head.new_empty(0)
    grad_head = head.new_empty(head.shape if needs_head else 0)
    return hidden.new_empty(hidden.shape if needs_hidden else 0), grad_head, grad_bias


def _setup_context(ctx, inputs, output):
    *tensors, ctx.kind, ctx.scale, ctx.softcap, ctx.drop, ctx.chunk_rows, ctx.impl, _, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:5])
    ctx.kept = output[5:]  # not saved: the first backward writes it, a further one goes without
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for what is kept would be as large again


def _backward(ctx, grad, *unused):
    hidden, head, labels, bias, weights, ref_hidden, ref_head, value, *saved = ctx.saved_tensors
    *needs, needs_weights = (grad is not None and ctx.needs_input_grad[i] for i in (0, 1, 3, 4))
    grads, kept, ctx.kept = [None] * 3, ctx.kept, ()
    if any(needs[1:]) and kept and kept[0].numel() and not torch.is_grad_enabled():
        kernel = backend.resolve("token_loss.head", ctx.impl, hidden)
        bias_grad = kernel(grad, hidden, head, labels, bias, weights, value, *saved[:2], *kept, ctx.kind, ctx.scale,
                           ctx.softcap, ctx.drop, *needs[1:])  # fmt: skip
        grads, needs = [None, kept[0] if needs[1] else None, bias_grad if needs[2] else None], [needs[0], False, False]
    if any(needs):
        results = _token_loss_backward(
            grad, hidden, head, labels, bias, weights, ref_hidden, ref_head, value, *saved,
            ctx.kind, ctx.scale, ctx.softcap, ctx.drop, ctx.chunk_rows, *needs, ctx.impl,
        )  # fmt: skip
        grads = [result if need else old for result, need, old in zip(results, needs, grads, strict=True)]
    grad_weights = torch.where(labels == IGNORED, 0, grad * value).to(weights.dtype) if needs_weights else None
    return grads[0], grads[1], None, grads[2], grad_weights, *[None] * 10


def _no_double_backward(ctx, *grads):
    raise RuntimeError("token_loss has no double backward; token_loss_ref has one")


_token_loss.register_autograd(_backward, setup_context=_setup_context)
_token_loss_backward.register_autograd(_no_double_backward)


def _forward_tiled(hidden, head, labels, bias, weights, ref_hidden, ref_head, kind, scale, softcap,
                   drop_zero_weights, chunk_rows):  # fmt: skip
    dtype = _wide(hidden, head)
    value = torch.zeros(labels.shape, dtype=dtype, device=labels.device)
    norm, ref_norm = value.new_zeros(2, *labels.shape), value.new_zeros(2, *labels.shape)
    ref_head = head if ref_head is None else ref_head
    counted = _counted(labels, weights, drop_zero_weights)
    _check_labels(labels[counted], kind, len(head))
    for rows in counted.split(chunk_rows or _DEFAULT_ROWS):
        h, y = hidden[rows].to(dtype), labels[rows]
        h_ref = ref_hidden[rows].to(dtype) if kind == "kl" else None
        picked = torch.zeros_like(value[rows])
        parts, ref_parts, crosses = [], [], []
        for tile in _tiles(len(rows), len(head), dtype):
            b = None if bias is None else bias[tile]
            z = _logits(h, head[tile], b, scale, softcap)
            parts.append(_peak_and_sum(z))
            if kind == "kl":
                z_ref = _logits(h_ref, ref_head[tile], b, scale, softcap)
                ref_parts.append(_peak_and_sum(z_ref))
                z, z_ref = z - parts[-1][0][:, None], z_ref - ref_parts[-1][0][:, None]
                q = z_ref.exp()
                crosses.append(torch.where(q == 0, 0, q * (z_ref - z)).sum(1))
            else:
                column, inside = _column(y, tile)
                picked = torch.where(inside, z.gather(1, column).squeeze(1), picked)
        shifts, norm[:, rows] = _merge(parts)
        if kind == "kl":
            ref_shifts, ref_norm[:, rows] = _merge(ref_parts)
            q_sums = torch.stack([total for _, total in ref_parts])
            # q (log q - log p) of a tile, unnormalised, moved from the maxima of the tile to those of the row
            cross = (torch.stack(crosses) + q_sums * (ref_shifts - shifts)) * ref_shifts.exp()
            p_sum, q_sum = norm[1, rows], ref_norm[1, rows]
            value[rows] = cross.sum(0) / q_sum + (p_sum / q_sum).log()
        else:
            nll = (norm[0, rows] - picked) + norm[1, rows].log()
            value[rows] = nll if kind == "nll" else -torch.log1p(-torch.exp(-nll) / 2)
    # an ignored row is 0 under a weight of NaN too
    weighted = value.clone() if weights is None else value * weights.to(dtype)
    return torch.where(labels == IGNORED, 0, weighted), value, norm, ref_norm


def _peak_and_sum(z: Tensor) -> tuple[Tensor, Tensor]:
    """(m, sum exp(z - m)) over the columns of a tile, m its maximum."""
    # finite, so that a tile of logits that are all -infinity sums to 0 and not to NaN
    m = z.amax(1).clamp_min(torch.finfo(z.dtype).min)
    return m, (z - m[:, None]).exp().sum(1)


def _merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(maximum of each tile minus that of the row [tiles, n]; maximum and sum of the row [2, n])."""
    peaks, sums = (torch.stack(values) for values in zip(*parts, strict=True))
    m = peaks.amax(0)
    return peaks - m, torch.stack([m, (sums * (peaks - m).exp()).sum(0)])


def _backward_tiled(grad, hidden, head, labels, bias, weights, ref_hidden, ref_head, value, norm, ref_norm,
                    kind, scale, softcap, drop_zero_weights, chunk_rows, needs_hidden, needs_head,
                    needs_bias):  # fmt: skip
    dtype = norm.dtype
    ref_head = head if ref_head is None else ref_head
    upstream = grad.to(dtype) if weights is None else grad.to(dtype) * weights.to(dtype)
    if kind == "uce":
        upstream = -upstream * torch.expm1(value)
    chunks = [
        (rows, hidden[rows].to(dtype), ref_hidden[rows].to(dtype) if kind == "kl" else None)
        for rows in _counted(labels, weights, drop_zero_weights).split(chunk_rows or _DEFAULT_ROWS)
    ]
    sums = [torch.zeros_like(h) if needs_hidden else None for _, h, _ in chunks]
    grad_head = head.new_zeros(head.shape if needs_head else 0)
    grad_bias = head.new_zeros(0) if not needs_bias else bias.new_zeros(bias.shape)
    # the vocabulary outside: a tile of the head's gradient is complete, and rounded once, when it is left
    for tile in _tiles(len(chunks[0][0]), len(head), dtype):
        w, b = head[tile].to(dtype), None if bias is None else bias[tile]
        grad_w, grad_b = torch.zeros_like(w) if needs_head else None, torch.zeros_like(w[:, 0])
        for (rows, h, h_ref), grad_h in zip(chunks, sums, strict=True):
            z = _logits(h, w, b, scale, softcap)
            dz = (z - norm[0, rows, None]).exp() / norm[1, rows, None]
            if kind == "kl":
                z_ref = _logits(h_ref, ref_head[tile], b, scale, softcap)
                dz = dz - (z_ref - ref_norm[0, rows, None]).exp() / ref_norm[1, rows, None]
            else:
                column, inside = _column(labels[rows], tile)
                dz = dz.scatter_add(1, column, -inside.to(dtype)[:, None])
            dz = dz * (upstream[rows] * scale)[:, None]
            if softcap is not None:
                dz = dz * (1 - (z / softcap).square())
            if needs_hidden:
                grad_h += dz @ w
            if needs_head:
                grad_w += dz.t() @ h
            if needs_bias:
                grad_b += dz.sum(0)
        if needs_head:
            grad_head[tile] = grad_w.to(head.dtype)
        if needs_bias:
            grad_bias[tile] = grad_b.to(bias.dtype)
    grad_hidden = hidden.new_zeros(hidden.shape if needs_hidden else 0)
    if needs_hidden:
        for (rows, _, _), grad_h in zip(chunks, sums, strict=True):
            grad_hidden[rows] = grad_h.to(hidden.dtype)
    return grad_hidden, grad_head, grad_bias


def _tiles(rows: int, vocabulary: int, dtype: torch.dtype) -> list[slice]:
    """Cuts of the vocabulary such that the tiles of `rows` rows fit the workspace."""
    width = max(1, WORKSPACE_BYTES // (_TEMPORARIES * dtype.itemsize * max(1, rows)))
    return [slice(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]


def _column(labels: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
    """(column [n, 1] of each label within the tile, clamped into it; whether it is inside [n])."""
    inside = (labels >= tile.start) & (labels < tile.stop)
    return (labels - tile.start).clamp(0, tile.stop - tile.start - 1)[:, None], inside


backend.register("token_loss", "ref", _forward_tiled)
backend.register("token_loss.backward", "ref", _backward_tiled)
native.register("token_loss", "moe_unlearn.ops.native.token_loss:forward")
native.register("token_loss.backward", "moe_unlearn.ops.native.token_loss:backward")
native.register(_KEPT, "moe_unlearn.ops.native.token_loss:forward_kept")
native.register("token_loss.room", "moe_unlearn.ops.native.token_loss:room")
native.register("token_loss.head", "moe_unlearn.ops.native.token_loss:head_gradient_")
backend.register("token_loss", "triton", "moe_unlearn.triton_kernels.token_loss:token_loss")
backend.register("token_loss.backward", "triton", "moe_unlearn.triton_kernels.token_loss:token_loss_backward")


def _check(hidden, head, labels, bias, weights, kind, ref_hidden, ref_head, softcap, chunk_rows):
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}; got {kind!r}")
    if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1] or len(head) == 0:
        raise ValueError(
            f"hidden_states and lm_head must be [T, H] and [V, H] with V >= 1; "
            f"got {list(hidden.shape)} and {list(head.shape)}"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64; got {labels.dtype}")
    if (ref_hidden is not None) != (kind == "kl") or (ref_head is not None and kind != "kl"):
        given = {"ref_hidden_states": ref_hidden, "ref_lm_head": ref_head}
        raise ValueError(
            f"kind 'kl' needs ref_hidden_states and takes ref_lm_head, other kinds take neither; "
            f"got kind {kind!r} with {[name for name, tensor in given.items() if tensor is not None]}"
        )
    (tokens, _), vocabulary = hidden.shape, len(head)
    shapes = {
        "hidden_states": (hidden, hidden.shape), "lm_head": (head, head.shape), "labels": (labels, (tokens,)),
        "bias": (bias, (vocabulary,)), "token_weights": (weights, (tokens,)),
        "ref_hidden_states": (ref_hidden, hidden.shape), "ref_lm_head": (ref_head, head.shape),
    }  # fmt: skip
    for name, (tensor, shape) in shapes.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}; got {list(tensor.shape)}")
        if name != "labels" and not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point; got {tensor.dtype}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device} like hidden_states; got {tensor.device}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"logit_softcap must be above 0, or None for none; got {softcap}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1; got {chunk_rows}")


def _check_labels(labels, kind, vocabulary):
    if kind == "kl" or labels.numel() == 0:
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"labels must be in [0, {vocabulary}) or {IGNORED}; got {low if low < 0 else high}")
