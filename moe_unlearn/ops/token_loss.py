"""token_loss: computes weighted per-token losses from hidden states and a head, without a T x V tensor of logits.

    z_t = cap(scale * (W h_t + b)),  cap(x) = softcap * tanh(x / softcap), the identity without softcap
    p_t = softmax(z_t),  loss[t] = w_t * l_t

    nll    l_t = -log p_t[y_t]                                       dl/dz = p - onehot(y)
    uce    l_t = -log(1 - p_t[y_t] / 2), in [0, log 2]               dl/dz = -(e^l - 1) (p - onehot(y))
    kl     l_t = sum_v q_t[v] (log q_t[v] - log p_t[v])              dl/dz = p - q
    ce     l_t = -sum_v q_t[v] log p_t[v]                            dl/dz = p - q
    logit_margin   l_t = (max z_t - mean z_t)^2                      dl/dz = 2 (max z - mean z) (onehot(argmax z) - 1/V)

With T tokens, hidden size H and vocabulary V: hidden_states h [T, H], lm_head W [V, H], labels y [T]. q is the softmax
of reference hidden states under the same head, or under a frozen copy of it; no gradient flows into q. For `ce`,
`label_penalty` is first subtracted from the label's logit in q (infinity leaves the label out); without reference
hidden states q is the model's own. For `uce`, e^l - 1 = p / (2 - p): the gradient at the target logit is
p (1 - p) / (2 - p). If several logits are largest, `logit_margin` lowers the first.

A row whose label is -100 or whose weight is 0 has loss exactly 0 and gradient exactly 0, whatever it holds, and is
dropped before the matrix product. (If the weights need a gradient, which is l_t, only the label drops a row.)
Worked example: for labels [5, -100, 2, 7] and weights [1, 3, 0, 2] only rows 0 and 3 are multiplied.

The other rows go in tiles of rows x vocabulary, whose logits and temporaries fit a workspace of 32 MiB. Logits and
softmax are float32, or float64 if an input is. The forward keeps a few numbers per row; the backward recomputes each
tile from the saved normaliser of the softmax. Gradients are summed in float32 and rounded once.

Precision: the normaliser is kept as the pair (max z, sum exp(z - max z)), so that a confident token keeps its
small loss and large logits lose nothing; kl of a row to itself is exactly 0, and q = 0 adds exactly 0.

`ce` and `logit_margin` have no kernels of their own: the tiles of `ref` compute them on every device.

The op is deterministic: tiles in a fixed order, no atomics. Sources: nll, kl and ce are standard; ce with the label's
logit lowered is UNDIAL's (arXiv 2402.10052), with the label left out CE-U's (arXiv 2503.01224); logit_margin is PDU's
logit margin flattening (arXiv 2506.05314), as its authors' trainer in open-unlearning has it; uce with its division by
2 was read in the FedOSD code of MOLLM's authors, its use in MOLLM is our reconstruction; tiling and dropping are ours.
"""

import torch
from torch import Tensor

from moe_unlearn import backend, native

KINDS = ("nll", "uce", "kl")
TILED_KINDS = ("ce", "logit_margin")  # kinds that only `ref` computes
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
    label_penalty: float = 0.0,
    chunk_rows: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Compute loss [T], float32 (float64 for float64); differentiable in hidden_states, lm_head, bias and weights.

    Args:
        hidden_states, lm_head, bias: any float dtypes; [T, H], [V, H] and [V].
        labels: int64 [T], -100 is ignored; for "kl" and "logit_margin" they only say which rows count.
        token_weights: float [T]; None stands for 1.
        kind: "nll", "uce", "kl", "ce" or "logit_margin".
        ref_hidden_states: [T, H], required by "kl", optional for "ce"; ref_lm_head: [V, H], if the reference had
            another head than `lm_head`.
        logit_scale, logit_softcap: as in the formula. label_penalty: at least 0, for "ce" only.
        chunk_rows: rows per tile, None for a default; the number of columns of a tile follows from it.

    Raises TypeError or ValueError for a dtype, shape, device, option or label that does not fit. There is
    no double backward; `token_loss_ref` has one.
    """
    _check(hidden_states, lm_head, labels, bias, token_weights, kind, ref_hidden_states, ref_lm_head,
           logit_softcap, label_penalty, chunk_rows)  # fmt: skip
    drop_zero_weights = token_weights is not None and not token_weights.requires_grad
    return _token_loss(
        hidden_states, lm_head, labels, bias, token_weights, ref_hidden_states, ref_lm_head, kind,
        float(logit_scale), None if logit_softcap is None else float(logit_softcap), drop_zero_weights,
        chunk_rows, impl, _trained(hidden_states), _trained(lm_head, bias), float(label_penalty),
    )[0]  # fmt: skip


def token_loss_ref(
    hidden_states, lm_head, labels, *, bias=None, token_weights=None, kind="nll", ref_hidden_states=None,
    ref_lm_head=None, logit_scale=1.0, logit_softcap=None, label_penalty=0.0,
) -> Tensor:  # fmt: skip
    """Compute `token_loss` in plain PyTorch, all logits at once, differentiable by autograd."""
    dtype = _wide(hidden_states, lm_head)
    drop_zero_weights = token_weights is not None and not token_weights.requires_grad
    rows = _counted(labels, token_weights, drop_zero_weights)
    z = _logits(hidden_states[rows].to(dtype), lm_head, bias, logit_scale, logit_softcap)
    log_p = torch.log_softmax(z, 1)
    if kind == "logit_margin":
        loss = (z.max(1).values - z.mean(1)).square()
    elif kind in ("kl", "ce"):
        z_ref = z.detach()
        if ref_hidden_states is not None:
            head = lm_head if ref_lm_head is None else ref_lm_head
            z_ref = _logits(ref_hidden_states[rows].to(dtype), head, bias, logit_scale, logit_softcap).detach()
        if label_penalty:
            at_label = torch.nn.functional.one_hot(labels[rows], len(lm_head)).bool()
            z_ref = torch.where(at_label, z_ref - label_penalty, z_ref)
        log_q = torch.log_softmax(z_ref, 1)
        q = log_q.exp()
        loss = torch.where(q == 0, 0, q * ((log_q if kind == "kl" else 0) - log_p)).sum(1)
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
    """Return the indices of the rows that are computed, ascending."""
    counted = labels != IGNORED
    if drop_zero_weights:
        counted = counted & (token_weights != 0)
    return counted.nonzero().squeeze(1)


def _logits(h: Tensor, head: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Compute the logits [n, v] in the dtype of `h` under `head` [v, H] of any dtype."""
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
    label_penalty: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the losses and everything that the backward needs of the forward.

    Returns (loss [T], l [T], max z and sum exp(z - max z) of the softmax [2, T], those of the reference [2, T], dl/dh,
    ...), all 0 in dropped rows; logit_margin keeps its own numbers in the place of the pairs. dl/dh [T, H] is for the
    backward, empty unless `keep` is set and the kernel can keep it; the last three are for the gradients of head and
    bias, kept if `keep_head` is set.
    """
    arguments = (hidden, head, labels, bias, weights, ref_hidden, ref_head, kind, scale, softcap,
                 drop_zero_weights, chunk_rows)  # fmt: skip
    kept = _kept(hidden, impl, kind, keep or keep_head)
    kernel = backend.resolve(kept or _name(kind), impl, hidden)
    if kind == "ce":
        arguments += (label_penalty,)
    with torch.autocast(hidden.device.type, enabled=False):
        none = [hidden.new_empty(0) for _ in range(4)]
        return kernel(*arguments, keep, keep_head) if kept else (*kernel(*arguments), *none)


def _name(kind: str) -> str:
    return {"ce": "token_loss.tiled", "logit_margin": "token_loss.logit_margin"}.get(kind, "token_loss")


def _kept(hidden: Tensor, impl: str, kind: str, keep: bool) -> str:
    """Return the name of the part that keeps dl/dh, if the chosen implementation has it, else ""."""
    if kind in TILED_KINDS:
        return ""
    chosen = backend.choose("token_loss", impl, hidden.device.type, hidden.dtype) if keep else None
    return _KEPT if backend.has(_KEPT, chosen, hidden.device.type) else ""


@_token_loss.register_fake
def _(hidden, head, labels, bias, weights, ref_hidden, ref_head, kind, scale, softcap, drop, chunk_rows, impl,
      keep=False, keep_head=False, label_penalty=0.0):  # fmt: skip
    loss = hidden.new_empty(labels.shape, dtype=_wide(hidden, head))
    pair = loss.new_empty(2, *labels.shape)
    kept = [hidden.new_empty(0) for _ in range(4)]
    if _kept(hidden, impl, kind, keep or keep_head):
        room = backend.resolve("token_loss.room", impl, hidden)
        kept = room(hidden, head, labels, bias, ref_hidden, ref_head, kind, keep, keep_head)
    return loss, torch.empty_like(loss), pair, torch.empty_like(pair), *kept


@torch.library.custom_op("moe_unlearn::token_loss_backward", mutates_args=())
def _token_loss_backward(
    grad: Tensor, hidden: Tensor, head: Tensor, labels: Tensor, bias: Tensor | None, weights: Tensor | None,
    ref_hidden: Tensor | None, ref_head: Tensor | None, value: Tensor, norm: Tensor, ref_norm: Tensor,
    direction: Tensor, kind: str, scale: float, softcap: float | None, drop_zero_weights: bool, chunk_rows: int | None,
    needs_hidden: bool, needs_head: bool, needs_bias: bool, impl: str, label_penalty: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of hidden, head and bias; an empty tensor for one that is not needed."""
    kernel = backend.resolve(f"{_name(kind)}.backward", impl, hidden)
    kept = {"direction": direction} if direction.numel() else {}
    if kind == "ce":
        kept["label_penalty"] = label_penalty
    with torch.autocast(hidden.device.type, enabled=False):
        return kernel(grad, hidden, head, labels, bias, weights, ref_hidden, ref_head, value, norm,
                      ref_norm, kind, scale, softcap, drop_zero_weights, chunk_rows, needs_hidden,
                      needs_head, needs_bias, **kept)  # fmt: skip


@_token_loss_backward.register_fake
def _(grad, hidden, head, labels, bias, weights, ref_hidden, ref_head, value, norm, ref_norm, direction, kind, scale,
      softcap, drop, chunk_rows, needs_hidden, needs_head, needs_bias, impl, label_penalty=0.0):  # fmt: skip
    grad_bias = bias.new_empty(bias.shape) if needs_bias else head.new_empty(0)
    grad_head = head.new_empty(head.shape if needs_head else 0)
    return hidden.new_empty(hidden.shape if needs_hidden else 0), grad_head, grad_bias


def _setup_context(ctx, inputs, output):
    *tensors, ctx.kind, ctx.scale, ctx.softcap, ctx.drop, ctx.chunk_rows, ctx.impl, _, _, ctx.penalty = inputs
    ctx.save_for_backward(*tensors, *output[1:5])
    ctx.kept = output[5:]  # not saved: the first backward overwrites it, a second one recomputes it
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zero gradients of the kept tensors would be as large as these


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
            ctx.kind, ctx.scale, ctx.softcap, ctx.drop, ctx.chunk_rows, *needs, ctx.impl, ctx.penalty,
        )  # fmt: skip
        grads = [result if need else old for result, need, old in zip(results, needs, grads, strict=True)]
    grad_weights = torch.where(labels == IGNORED, 0, grad * value).to(weights.dtype) if needs_weights else None
    return grads[0], grads[1], None, grads[2], grad_weights, *[None] * 11


def _no_double_backward(ctx, *grads):
    raise RuntimeError("token_loss has no double backward; token_loss_ref has one")


_token_loss.register_autograd(_backward, setup_context=_setup_context)
_token_loss_backward.register_autograd(_no_double_backward)


def _tiles(rows: int, vocabulary: int, dtype: torch.dtype) -> list[slice]:
    """Cut the vocabulary into slices so that tiles of `rows` rows fit the workspace."""
    width = max(1, WORKSPACE_BYTES // (_TEMPORARIES * dtype.itemsize * max(1, rows)))
    return [slice(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]


for name, file in (("", "token_loss"), (".tiled", "token_loss"), (".logit_margin", "logit_margin")):
    backend.register(f"token_loss{name}", "ref", f"moe_unlearn.ops.tiled.{file}:forward")
    backend.register(f"token_loss{name}.backward", "ref", f"moe_unlearn.ops.tiled.{file}:backward")
native.register("token_loss", "moe_unlearn.ops.native.token_loss:forward")
native.register("token_loss.backward", "moe_unlearn.ops.native.token_loss:backward")
native.register(_KEPT, "moe_unlearn.ops.native.token_loss:forward_kept")
native.register("token_loss.room", "moe_unlearn.ops.native.token_loss:room")
native.register("token_loss.head", "moe_unlearn.ops.native.token_loss:head_gradient_")
backend.register("token_loss", "triton", "moe_unlearn.triton_kernels.token_loss:token_loss")
backend.register("token_loss.backward", "triton", "moe_unlearn.triton_kernels.token_loss:token_loss_backward")


def _check(hidden, head, labels, bias, weights, kind, ref_hidden, ref_head, softcap, penalty, chunk_rows):
    if kind not in KINDS + TILED_KINDS:
        raise ValueError(f"kind must be one of {KINDS + TILED_KINDS}; got {kind!r}")
    if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1] or len(head) == 0:
        raise ValueError(
            f"hidden_states and lm_head must be [T, H] and [V, H] with V >= 1; "
            f"got {list(hidden.shape)} and {list(head.shape)}"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64; got {labels.dtype}")
    known = ref_hidden is not None
    if (known and kind not in ("kl", "ce")) or (not known and (kind == "kl" or ref_head is not None)):
        given = {"ref_hidden_states": ref_hidden, "ref_lm_head": ref_head}
        raise ValueError(
            f"kind 'kl' needs ref_hidden_states, 'ce' takes them, both with ref_lm_head, other kinds take neither; "
            f"got kind {kind!r} with {[name for name, tensor in given.items() if tensor is not None]}"
        )
    if not penalty >= 0 or (penalty and kind != "ce"):
        raise ValueError(
            f"label_penalty must be at least 0, and 0 for kinds other than 'ce'; got {penalty} for {kind!r}"
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
