"""token_loss: hidden states x head -> per-token losses with per-token weights; logits are never stored.

    z_t = softcap * tanh(scale * (head h_t + bias) / softcap)      (without softcap: scale * (head h_t + bias))
    loss[t] = w_t * l_t
    nll     l_t = logsumexp(z_t) - z_t[y_t] = -log p
    uce     l_t = -log(1 - p / 2)                                  in [0, log 2]; d/dz_y = p (1 - p) / (2 - p)
    kl      l_t = sum_v q_v (log q_v - log p_v),  q from the reference hidden states through the same head

Shapes: T tokens, H hidden, V vocabulary; hidden_states [T, H], lm_head [V, H], labels [T]. Rows whose label
is -100 or whose weight is 0 are exactly 0, have zero gradient, and are dropped before the product. The rest
go in chunks of rows whose logits fit a workspace of 32 MiB, forward and backward; saved for the backward is
one log-sum-exp per row. Logits and softmax are float32 (float64 for float64).

Deterministic: chunks in order. Source: UCE from the MOLLM authors' FedOSD code (the division by 2 was read
there; its use in MOLLM is a reconstruction), the others standard.
"""

import torch
from torch import Tensor

from moe_unlearn import backend

KINDS = ("nll", "uce", "kl")
IGNORED = -100
WORKSPACE_BYTES = 32 * 2**20


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
    impl: str = "auto",
) -> Tensor:
    """loss [T] float32 (float64 for float64), differentiable in hidden states, head, bias and weights.

    Args:
        labels: int64 [T], -100 ignored; for "kl" they only say which rows count.
        token_weights: float [T] >= 0, None is 1.
        ref_hidden_states: [T, H], and ref_lm_head: [V, H] if the head has changed; with "kl" only.
        logit_scale, logit_softcap: as in the formula.

    Raises TypeError or ValueError for what does not fit. A label outside [0, V) is an error too.
    """
    _check(hidden_states, lm_head, labels, bias, token_weights, kind, ref_hidden_states, ref_lm_head)
    if token_weights is not None:
        token_weights = token_weights.to(torch.promote_types(hidden_states.dtype, torch.float32))
    return _token_loss(
        hidden_states, lm_head, labels, bias, token_weights, kind, ref_hidden_states, ref_lm_head,
        float(logit_scale), float(logit_softcap or 0.0), impl,
    )[0]  # fmt: skip


def token_loss_ref(
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
) -> Tensor:
    """`token_loss` in plain PyTorch with all logits at once, differentiable by autograd."""
    logp = torch.log_softmax(_logits(hidden_states, lm_head, bias, logit_scale, logit_softcap or 0.0), -1)
    if kind == "kl":
        head = lm_head if ref_lm_head is None else ref_lm_head
        reference = _logits(ref_hidden_states, head, bias, logit_scale, logit_softcap or 0.0).detach()
        logq = torch.log_softmax(reference, -1)
        loss = (logq.exp() * (logq - logp)).sum(-1)
    else:
        picked = logp.gather(1, labels.clamp_min(0)[:, None])[:, 0]
        loss = -picked if kind == "nll" else -torch.log1p(-0.5 * picked.exp())
    if token_weights is not None:
        loss = torch.where(token_weights == 0, 0.0, loss) * token_weights
    return torch.where(labels == IGNORED, 0.0, loss)


def _logits(hidden, head, bias, scale, softcap):
    """[n, V] in at least float32; `softcap` 0 is none."""
    z = torch.nn.functional.linear(hidden, head, bias).to(torch.promote_types(hidden.dtype, torch.float32))
    z = z if scale == 1.0 else z * scale
    return softcap * torch.tanh(z / softcap) if softcap else z


def _kept_chunks(hidden, head, labels, token_weights):
    """Indices of the rows that count, in chunks whose logits fit the workspace."""
    kept = labels != IGNORED
    if token_weights is not None:
        kept = kept & (token_weights != 0)
    width = torch.promote_types(hidden.dtype, torch.float32).itemsize
    return kept.nonzero()[:, 0].split(max(1, WORKSPACE_BYTES // (width * len(head))))


def _forward_ref(hidden, head, labels, bias, token_weights, kind, ref_hidden, ref_head, scale, softcap):
    """(loss [T], log-sum-exp [T])."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    loss = torch.zeros(len(hidden), dtype=dtype, device=hidden.device)
    lse = torch.zeros_like(loss)
    for rows in _kept_chunks(hidden, head, labels, token_weights):
        z = _logits(hidden[rows], head, bias, scale, softcap)
        lse[rows] = z.logsumexp(-1)
        if kind == "kl":
            logq = torch.log_softmax(
                _logits(ref_hidden[rows], head if ref_head is None else ref_head, bias, scale, softcap), -1
            )
            value = (logq.exp() * (logq - (z - lse[rows, None]))).sum(-1)
        else:
            logp = z.gather(1, labels[rows, None])[:, 0] - lse[rows]
            value = -logp if kind == "nll" else -torch.log1p(-0.5 * logp.exp())
        loss[rows] = value if token_weights is None else value * token_weights[rows]
    return loss, lse


def _backward_ref(grad, hidden, head, labels, bias, token_weights, kind, ref_hidden, ref_head, scale, softcap,
                  lse, needs_hidden, needs_head, needs_bias, needs_weights):  # fmt: skip
    """Gradients of hidden, head, bias and weights; an empty tensor where not needed."""
    dtype = lse.dtype
    d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needs_hidden else None
    d_head = torch.zeros_like(head, dtype=dtype, memory_format=torch.contiguous_format) if needs_head else None
    d_bias = torch.zeros_like(bias, dtype=dtype) if needs_bias else None
    d_weights = torch.zeros_like(token_weights) if needs_weights else None
    for rows in _kept_chunks(hidden, head, labels, token_weights):
        z = _logits(hidden[rows], head, bias, scale, softcap)
        p = (z - lse[rows, None]).exp()
        if kind == "kl":
            logq = torch.log_softmax(
                _logits(ref_hidden[rows], head if ref_head is None else ref_head, bias, scale, softcap), -1
            )
            q = logq.exp()
            value = (q * (logq - (z - lse[rows, None]))).sum(-1)
            dz = p - q
        else:
            target = p.gather(1, labels[rows, None])
            logp = (z.gather(1, labels[rows, None])[:, 0] - lse[rows])
            if kind == "nll":
                value, factor = -logp, torch.ones_like(target)
            else:
                value, factor = -torch.log1p(-0.5 * logp.exp()), -target / (2 - target)
            dz = p * factor
            dz.scatter_add_(1, labels[rows, None], -factor)
        if needs_weights:
            d_weights[rows] = grad[rows] * value
        upstream = grad[rows].to(dtype)
        dz = dz * (upstream if token_weights is None else upstream * token_weights[rows])[:, None]
        if softcap:
            dz = dz * (1 - (z / softcap).square())
        dz = (dz if scale == 1.0 else dz * scale).to(hidden.dtype)
        if needs_hidden:
            d_hidden[rows] = dz @ head
        if needs_head:
            d_head += (dz.t() @ hidden[rows]).to(dtype)
        if needs_bias:
            d_bias += dz.to(dtype).sum(0)
    gradients = (d_hidden, d_head, d_bias, d_weights)
    dtypes = (hidden.dtype, head.dtype, hidden.dtype, dtype)
    # an op returns tensors, each one its own
    return tuple(
        hidden.new_empty(0) if g is None else g.to(d) for g, d in zip(gradients, dtypes, strict=True)
    )


@torch.library.custom_op("moe_unlearn::token_loss", mutates_args=())
def _token_loss(
    hidden_states: Tensor, lm_head: Tensor, labels: Tensor, bias: Tensor | None, token_weights: Tensor | None,
    kind: str, ref_hidden_states: Tensor | None, ref_lm_head: Tensor | None, scale: float, softcap: float,
    impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kernel = backend.resolve("token_loss", impl, hidden_states)
    return kernel(
        hidden_states, lm_head, labels, bias, token_weights, kind, ref_hidden_states, ref_lm_head, scale, softcap
    )


@_token_loss.register_fake
def _(hidden_states, *rest):
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    shape = hidden_states.shape[:1]
    return hidden_states.new_empty(shape, dtype=dtype), hidden_states.new_empty(shape, dtype=dtype)


@torch.library.custom_op("moe_unlearn::token_loss_backward", mutates_args=())
def _token_loss_backward(
    grad: Tensor, hidden_states: Tensor, lm_head: Tensor, labels: Tensor, bias: Tensor | None,
    token_weights: Tensor | None, kind: str, ref_hidden_states: Tensor | None, ref_lm_head: Tensor | None,
    scale: float, softcap: float, lse: Tensor, needs_hidden: bool, needs_head: bool, needs_bias: bool,
    needs_weights: bool, impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    kernel = backend.resolve("token_loss.backward", impl, hidden_states)
    return kernel(
        grad, hidden_states, lm_head, labels, bias, token_weights, kind, ref_hidden_states, ref_lm_head, scale,
        softcap, lse, needs_hidden, needs_head, needs_bias, needs_weights,
    )  # fmt: skip


@_token_loss_backward.register_fake
def _(grad, hidden_states, lm_head, labels, bias, token_weights, kind, ref_hidden_states, ref_lm_head, scale,
      softcap, lse, needs_hidden, needs_head, needs_bias, needs_weights, impl):  # fmt: skip
    def like(tensor, needed):
        return tensor.new_empty(tensor.shape) if needed else hidden_states.new_empty(0)

    return (
        like(hidden_states, needs_hidden), like(lm_head, needs_head), like(bias, needs_bias),
        like(token_weights, needs_weights),
    )  # fmt: skip


def _setup_context(ctx, inputs, output):
    hidden, head, labels, bias, weights, ctx.kind, ref_hidden, ref_head, ctx.scale, ctx.softcap, ctx.impl = inputs
    ctx.save_for_backward(hidden, head, labels, bias, weights, ref_hidden, ref_head, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    hidden, head, labels, bias, weights, ref_hidden, ref_head, lse = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3, 4)]
    results = torch.ops.moe_unlearn.token_loss_backward(
        grad, hidden, head, labels, bias, weights, ctx.kind, ref_hidden, ref_head, ctx.scale, ctx.softcap, lse,
        *needs, ctx.impl,
    )  # fmt: skip
    d_hidden, d_head, d_bias, d_weights = (r if n else None for r, n in zip(results, needs, strict=True))
    return d_hidden, d_head, None, d_bias, d_weights, *[None] * 6


def _no_double_backward(ctx, *grads):
    raise RuntimeError("token_loss has no double backward; token_loss_ref has")


_token_loss.register_autograd(_backward, setup_context=_setup_context)
_token_loss_backward.register_autograd(_no_double_backward)
backend.register("token_loss", "ref", _forward_ref)
backend.register("token_loss.backward", "ref", _backward_ref)


def _check(hidden, head, labels, bias, token_weights, kind, ref_hidden, ref_head):
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}; got {kind!r}")
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden_states must be float [T, H]; got {hidden.dtype} {tuple(hidden.shape)}")
    if head.dim() != 2 or head.shape[1] != hidden.shape[1]:
        raise ValueError(f"lm_head must be [V, H] with H = {hidden.shape[1]}; got {tuple(head.shape)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64; got {labels.dtype}")
    if (kind == "kl") != (ref_hidden is not None):
        raise ValueError("ref_hidden_states goes with kind 'kl', and only with it")
    tokens = (len(hidden),)
    expected = {
        "labels": (labels, tokens),
        "bias": (bias, (len(head),)),
        "token_weights": (token_weights, tokens),
        "ref_hidden_states": (ref_hidden, tuple(hidden.shape)),
        "ref_lm_head": (ref_head, tuple(head.shape)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}; got {list(tensor.shape)}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device} like hidden_states; got {tensor.device}")
    for name, tensor in (("lm_head", head), ("bias", bias), ("ref_hidden_states", ref_hidden)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(f"{name} must be {hidden.dtype} like hidden_states; got {tensor.dtype}")
