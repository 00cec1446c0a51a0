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
tile from the saved normaliser of the softmax. Gradients are summed in float32 and rounded once. Kernels may compute
dl/dh in the forward, which knows all but a factor of each row: in Triton a frozen head takes two products of rows and
head, a trained one four; for kl three and six. Precision: the normaliser is kept as the pair (max z, sum exp(z - max
z)), so that a confident token keeps its small loss and large logits lose nothing; kl of a row to itself is exactly 0,
and q = 0 adds exactly 0. `ce` and `logit_margin` have no kernels of their own: `ref` computes them on every device. The
op is deterministic: tiles in a fixed order, no atomics. Sources: nll, kl and ce are standard; ce with the label's logit
lowered is UNDIAL's (arXiv 2402.10052), with the label left out CE-U's (arXiv 2503.01224); logit_margin is PDU's logit
margin flattening (arXiv 2506.05314), as its authors' trainer in open-unlearning has it; uce with its division by 2 was
read in the FedOSD code of MOLLM's authors, its use in MOLLM is our reconstruction; tiling and dropping are ours.
"""

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from moe_unlearn import backend, native
from moe_unlearn.ops.checks import check_objects
from moe_unlearn.ops.custom import custom_op
from moe_unlearn.ops.schema import fields

KINDS = ("nll", "uce", "kl")
TILED_KINDS = ("ce", "logit_margin")  # kinds that only `ref` computes
IGNORED = -100
WORKSPACE_BYTES = 32 * 2**20
_TEMPORARIES = 4  # tiles of logits alive at a time: z, p, and for kl the two of the reference
_DEFAULT_ROWS = 4096
_KEPT = "token_loss.kept"


class Head(NamedTuple):
    """The output head of a model: weight W [V, H], bias b [V], and what is done to its logits."""

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None


class Reference(NamedTuple):
    """Gives the targets q: hidden states [T, H], and a head [V, H] if the reference had one of its own."""

    hidden_states: Tensor | None
    lm_head: Tensor | None = None


class Operands(NamedTuple):
    """The tensors of a loss, as kernels take them."""

    hidden: Tensor
    head: Tensor
    labels: Tensor
    bias: Tensor | None
    weights: Tensor | None
    ref_hidden: Tensor | None
    ref_head: Tensor | None


class Formula(NamedTuple):
    """Which loss it is and how it is computed."""

    kind: str
    scale: float
    softcap: float | None
    drop_zero_weights: bool
    chunk_rows: int | None
    label_penalty: float = 0.0


class Softmax(NamedTuple):
    """Holds l [T] of each row, (max z, sum exp(z - max z)) [2, T], and the same of the reference, for the backward."""

    value: Tensor
    norm: Tensor
    ref_norm: Tensor


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    head: bool
    bias: bool


def token_loss(
    hidden_states: Tensor,
    head: Head,
    labels: Tensor,
    *,
    token_weights: Tensor | None = None,
    kind: str = "nll",
    reference: Reference | None = None,
    label_penalty: float = 0.0,
    chunk_rows: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Compute loss [T], float32 (float64 for float64); differentiable in hidden_states, head and weights.

    Args:
        hidden_states: [T, H]; head: weight [V, H], bias [V] or None, scale and soft-cap. Any float dtypes, also mixed.
        labels: int64 [T], -100 is ignored; for "kl" and "logit_margin" they only say which rows count.
        token_weights: float [T]; None stands for 1.
        kind: "nll", "uce", "kl", "ce" or "logit_margin".
        reference: required by "kl", optional for "ce"; label_penalty: at least 0, for "ce" only.
        chunk_rows: rows per tile, None for a default; the number of columns of a tile follows from it.

    Raises TypeError or ValueError for a dtype, shape, device, option or label that does not fit. There is
    no double backward; `token_loss_ref` has one.
    """
    check_objects(head=(head, Head))
    if reference is not None:
        check_objects(reference=(reference, Reference))
    operands = _operands(hidden_states, head, labels, token_weights, reference)
    formula = Formula(kind, head.logit_scale, head.logit_softcap, _drops(token_weights), chunk_rows, label_penalty)
    _check(operands, formula)
    keep, keep_head = _trained(hidden_states), _trained(head.weight, head.bias)
    loss: Tensor = _token_loss(*operands, *formula, impl, keep, keep_head)[0]
    return loss


def token_loss_ref(
    hidden_states: Tensor,
    head: Head,
    labels: Tensor,
    *,
    token_weights: Tensor | None = None,
    kind: str = "nll",
    reference: Reference | None = None,
    label_penalty: float = 0.0,
) -> Tensor:
    """Compute `token_loss` in plain PyTorch, all logits at once, differentiable by autograd."""
    h, weight, labels, bias, weights, h_ref, ref_head = _operands(hidden_states, head, labels, token_weights, reference)
    dtype, cap = _wide(h, weight), (head.logit_scale, head.logit_softcap)
    rows = _counted(labels, weights, _drops(weights))
    z = _logits(h[rows].to(dtype), weight, bias, *cap)
    log_p = torch.log_softmax(z, 1)
    if kind == "logit_margin":
        loss = (z.max(1).values - z.mean(1)).square()
    elif kind in ("kl", "ce"):
        z_ref = z.detach()
        if h_ref is not None:
            z_ref = _logits(h_ref[rows].to(dtype), weight if ref_head is None else ref_head, bias, *cap).detach()
        if label_penalty:
            at_label = torch.nn.functional.one_hot(labels[rows], len(weight)).bool()
            z_ref = torch.where(at_label, z_ref - label_penalty, z_ref)
        log_q = torch.log_softmax(z_ref, 1)
        q = log_q.exp()
        loss = torch.where(q == 0, 0, q * ((log_q if kind == "kl" else 0) - log_p)).sum(1)
    else:
        log_py = log_p.gather(1, labels[rows, None]).squeeze(1)
        loss = -log_py if kind == "nll" else -torch.log1p(-log_py.exp() / 2)
    if weights is not None:
        loss = weights[rows].to(dtype) * loss
    return torch.zeros(labels.shape, dtype=dtype, device=labels.device).index_put((rows,), loss)


def _operands(h: Tensor, head: Head, labels: Tensor, weights: Tensor | None, reference: Reference | None) -> Operands:
    ref_hidden, ref_head = (None, None) if reference is None else reference
    return Operands(h, head.weight, labels, head.bias, weights, ref_hidden, ref_head)


def _drops(token_weights: Tensor | None) -> bool:
    return token_weights is not None and not token_weights.requires_grad


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


@custom_op(
    "moe_unlearn::token_loss",
    schema=f"({fields(Operands, Formula)}, str impl, bool keep, bool keep_head) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _token_loss(*operands: Any) -> tuple[Tensor, ...]:
    """Compute the losses and everything that the backward needs of the forward.

    Returns (loss [T], l [T], max z and sum exp(z - max z) of the softmax [2, T], those of the reference [2, T], dl/dh,
    ...), all 0 in dropped rows; logit_margin keeps its own numbers in the place of the pairs. dl/dh [T, H] is for the
    backward, empty unless `keep` is set and the kernel can keep it; the last three are for the gradients of head and
    bias, kept if `keep_head` is set.
    """
    hidden, *tensors, kind, scale, softcap, drop, chunk_rows, penalty, impl, keep, keep_head = operands
    kept = kept_part(hidden, tensors[0], impl, kind, keep, keep_head)
    kernel = backend.resolve(kept or _name(kind), impl, hidden)
    numbers = scale, softcap, drop, chunk_rows, *((penalty,) if kind == "ce" else ())  # the others take no penalty
    with torch.autocast(hidden.device.type, enabled=False):
        if kept:
            return tuple(kernel(hidden, *tensors, kind, *numbers, keep, keep_head))
        return *kernel(hidden, *tensors, kind, *numbers), *(hidden.new_empty(0) for _ in range(4))


def unflattened(*operands: Any) -> tuple[Operands, Formula]:
    """Return the tensors and the formula of a loss from what its kernels take one after the other."""
    return Operands(*operands[:7]), Formula(*operands[7:])


def _name(kind: str) -> str:
    return {"ce": "token_loss.tiled", "logit_margin": "token_loss.logit_margin"}.get(kind, "token_loss")


def kept_part(hidden: Tensor, head: Tensor, impl: str, kind: str, keep: bool, keep_head: bool) -> str:
    """Return the name of the part that keeps dl/dh, else ""; Triton's `token_loss_kept` says what it cannot keep."""
    if kind in TILED_KINDS or not (keep or keep_head):
        return ""
    chosen = backend.choose("token_loss", impl, hidden.device.type, hidden.dtype)
    able = chosen != "triton" or (keep and not hidden.dtype == head.dtype == torch.float16)
    return _KEPT if able and backend.has(_KEPT, chosen, hidden.device.type) else ""


@_token_loss.register_fake
def _(*operands: Any) -> tuple[Tensor, ...]:
    *flat, impl, keep, keep_head = operands
    tensors, formula = unflattened(*flat)
    hidden = tensors.hidden
    loss = hidden.new_empty(tensors.labels.shape, dtype=_wide(hidden, tensors.head))
    pair, kept = loss.new_empty(2, *loss.shape), [hidden.new_empty(0) for _ in range(4)]
    if kept_part(hidden, tensors.head, impl, formula.kind, keep, keep_head):
        kept = backend.resolve("token_loss.room", impl, hidden)(tensors, formula.kind, keep, keep_head)
    return loss, torch.empty_like(loss), pair, torch.empty_like(pair), *kept


@custom_op(
    "moe_unlearn::token_loss_backward",
    schema=f"(Tensor grad, {fields(Operands, Softmax, Formula)}, bool needs_hidden, bool needs_head, bool needs_bias, "
    "Tensor direction, str impl) -> (Tensor, Tensor, Tensor)",
)
def _token_loss_backward(grad: Tensor, hidden: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    """Compute the gradients of hidden, head and bias; an empty tensor for one that is not needed."""
    *tensors, kind, scale, softcap, drop, rows, penalty, need_hidden, need_head, need_bias, direction, impl = operands
    numbers = scale, softcap, drop, rows, *((penalty,) if kind == "ce" else ())
    kernel = backend.resolve(f"{_name(kind)}.backward", impl, hidden)
    kept = {"direction": direction} if direction.numel() else {}
    with torch.autocast(hidden.device.type, enabled=False):
        return tuple(kernel(grad, hidden, *tensors, kind, *numbers, need_hidden, need_head, need_bias, **kept))


def backward_operands(*operands: Any) -> tuple[Operands, Softmax, Formula, Needs]:
    """Return the objects whose fields the kernels of the backward take one after the other."""
    tensors, softmax, formula, needs = operands[:7], operands[7:10], operands[10:-3], operands[-3:]
    return Operands(*tensors), Softmax(*softmax), Formula(*formula), Needs(*needs)


@_token_loss_backward.register_fake
def _(grad: Tensor, hidden: Tensor, head: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    _, bias, *_, needs_hidden, needs_head, needs_bias, _, _ = operands
    grad_bias = bias.new_empty(bias.shape) if needs_bias else head.new_empty(0)
    grad_head = head.new_empty(head.shape if needs_head else 0)
    return hidden.new_empty(hidden.shape if needs_hidden else 0), grad_head, grad_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *flat, ctx.impl, _, _ = inputs
    operands, ctx.formula = unflattened(*flat)
    _, value, norm, ref_norm, direction, *kept = output
    ctx.save_for_backward(*operands, value, norm, ref_norm, direction)
    ctx.kept = kept  # not saved: the first backward overwrites it, a second one recomputes it
    ctx.mark_non_differentiable(value, norm, ref_norm, direction, *kept)
    ctx.set_materialize_grads(False)  # zero gradients of the kept tensors would be as large as these


def _backward(ctx: Any, grad: Tensor | None, *unused: object) -> tuple[Tensor | None, ...]:
    *tensors, value, norm, ref_norm, direction = ctx.saved_tensors
    operands, softmax = Operands(*tensors), Softmax(value, norm, ref_norm)
    hidden, head, labels, bias, weights, *_ = tensors
    need_hidden, need_head, _, need_bias, need_weights, *_ = (grad is not None and n for n in ctx.needs_input_grad)
    needs, kept, ctx.kept = Needs(need_hidden, need_head, need_bias), ctx.kept, ()
    grads: list[Tensor | None] = [None] * 3
    if (need_head or need_bias) and kept and kept[0].numel() and not torch.is_grad_enabled():
        kernel, (kind, scale, softcap, drop, *_) = backend.resolve("token_loss.head", ctx.impl, hidden), ctx.formula
        own = grad, hidden, head, labels, bias, weights, *softmax, *kept
        bias_grad = kernel(*own, kind, scale, softcap, drop, need_head, need_bias)
        grads = [None, kept[0] if need_head else None, bias_grad if need_bias else None]
        needs = Needs(need_hidden, False, False)
    if any(needs):
        results = _token_loss_backward(grad, *operands, *softmax, *ctx.formula, *needs, direction, ctx.impl)
        grads = [result if need else old for result, need, old in zip(results, needs, grads, strict=True)]
    grad_weights = torch.where(labels == IGNORED, 0, value * grad).to(weights.dtype) if need_weights else None
    return grads[0], grads[1], None, grads[2], grad_weights, *[None] * 11


def _no_double_backward(ctx: object, *grads: object) -> NoReturn:
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
backend.register("token_loss.backward", "triton", "moe_unlearn.triton_kernels.token_loss_backward:token_loss_backward")
backend.register(_KEPT, "triton", "moe_unlearn.triton_kernels.token_loss_kept:token_loss_kept")
backend.register("token_loss.room", "triton", "moe_unlearn.triton_kernels.token_loss_kept:room")


def _check(operands: Operands, formula: Formula) -> None:
    hidden, head, labels, bias, weights, ref_hidden, ref_head = operands
    kind, _, softcap, _, chunk_rows, penalty = formula
    if kind not in KINDS + TILED_KINDS:
        raise ValueError(f"kind must be one of {KINDS + TILED_KINDS}; got {kind!r}")
    if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1] or len(head) == 0:
        raise ValueError(
            f"hidden_states and head.weight must be [T, H] and [V, H] with V >= 1; "
            f"got {list(hidden.shape)} and {list(head.shape)}"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64; got {labels.dtype}")
    known = ref_hidden is not None
    if (known and kind not in ("kl", "ce")) or (not known and (kind == "kl" or ref_head is not None)):
        raise ValueError(
            f"kind 'kl' needs a reference with hidden_states, 'ce' may, other kinds take neither; got kind {kind!r} "
            f"with {'' if known else 'no '}hidden_states and {'no' if ref_head is None else 'a'} head of a reference"
        )
    if not penalty >= 0 or (penalty and kind != "ce"):
        raise ValueError(f"label_penalty must be at least 0, 0 for kinds other than 'ce'; got {penalty} for {kind!r}")
    (tokens, _), vocabulary = hidden.shape, len(head)
    shapes = {
        "hidden_states": (hidden, hidden.shape),
        "head.weight": (head, head.shape),
        "labels": (labels, (tokens,)),
        "head.bias": (bias, (vocabulary,)),
        "token_weights": (weights, (tokens,)),
        "reference.hidden_states": (ref_hidden, hidden.shape),
        "reference.lm_head": (ref_head, head.shape),
    }
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
