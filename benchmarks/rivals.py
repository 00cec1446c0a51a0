"""Adapt the rivals that ours is measured against; where an optional one is missing, say why.

    pip install .[rivals]      those on PyPI that need no torch of their own

An adapter imports its library when it is called; `Missing` carries the line that takes its place in the results.
"""

import functools
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.layers import Layer

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Missing(Exception):
    """Error that says why a rival cannot be measured here."""


def collected(adapters: dict[str, Callable], *arguments) -> tuple[dict[str, Callable], dict[str, str]]:
    """Return what the adapters make of the arguments, and the reasons why others make nothing."""
    found, missing = {}, {}
    for name, adapter in adapters.items():
        try:
            found[name] = adapter(*arguments)
        except Missing as reason:
            missing[name] = str(reason)
    return found, missing


def module(name: str, package: str | None = None, *, gpu: bool = False):
    """Import and return a module; raise Missing where it is not installed, breaks, or needs a GPU that is not there."""
    if gpu and not torch.cuda.is_available():
        raise Missing("its kernels need a GPU")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Missing(f"not installed ({package or error.name})") from None
    except Exception as error:  # noqa: BLE001 -- libraries break at import in ways of their own
        raise Missing(f"its import fails: {type(error).__name__}: {str(error).splitlines()[0][:120]}") from None


def _transformers(implementation: str, layer: Layer) -> Experts:
    if implementation == "sonicmoe":
        sonicmoe = module("transformers.integrations.sonicmoe", gpu=True)
        try:
            sonicmoe.is_sonicmoe_loadable(raise_error=True)
            sonicmoe.load_sonicmoe_kernel()
        except Exception as error:  # noqa: BLE001 -- it is downloaded and compiled, so anything may come
            raise Missing(f"{type(error).__name__}: {str(error).splitlines()[0][:160]}") from None

    def experts(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        layer.experts.config._experts_implementation = implementation
        return layer.experts(hidden, index, weights)

    return experts


def _torch_grouped_mm(layer: Layer) -> Experts:
    if not hasattr(F, "grouped_mm"):
        raise Missing(f"torch {torch.__version__} has no F.grouped_mm")
    if layer.geometry.gpt_oss:
        raise Missing("biases and the clamped gate would be further calls")
    gate_up, down = layer.experts.gate_up_proj, layer.experts.down_proj

    def experts(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        flat = index.flatten()
        order = flat.argsort(stable=True)
        offsets = torch.bincount(flat, minlength=len(gate_up)).cumsum(0).int()
        gate, up = F.grouped_mm(hidden[order // index.shape[1]], gate_up.mT, offs=offsets).chunk(2, -1)
        rows = F.grouped_mm(F.silu(gate) * up, down.mT, offs=offsets) * weights.flatten()[order, None]
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return rows[back].view(*index.shape, -1).sum(1)

    return experts


def _liger_experts(layer: Layer) -> Experts:
    if layer.geometry.gpt_oss:
        raise Missing("knows neither biases nor the clamped gate")
    function = module("liger_kernel.ops.fused_moe", "liger-kernel", gpu=True).LigerFusedMoEFunction

    def experts(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return function.apply(hidden, layer.experts.gate_up_proj, layer.experts.down_proj, index.int(), weights)

    return experts


EXPERTS: dict[str, Callable[[Layer], Experts]] = {
    "transformers grouped_mm": functools.partial(_transformers, "grouped_mm"),
    "transformers eager": functools.partial(_transformers, "eager"),
    "torch F.grouped_mm": _torch_grouped_mm,
    "liger fused_moe": _liger_experts,
    "sonic-moe": functools.partial(_transformers, "sonicmoe"),
}
PEERS = ("liger fused_moe", "sonic-moe")


def _logits(widen: bool) -> Loss:
    def loss(h: Tensor, head: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        logits = h @ head.t()
        return F.cross_entropy(logits.float() if widen else logits, labels, reduction="none") @ weights

    return loss


def _torch_linear_loss(chunked: bool) -> Loss:
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise Missing(f"torch {torch.__version__} has no F.linear_cross_entropy")
    if not chunked:
        return lambda h, head, labels, weights: function(h, head, labels, reduction="none") @ weights.to(h.dtype)
    options = torch.nn.LinearCrossEntropyOptions()
    # the chunked form takes no token weights: it computes the plain mean, which equals uniform weights
    return lambda h, head, labels, weights: function(h, head, labels, options=options)


def _liger_loss() -> Loss:
    function = module("liger_kernel.transformers.functional", "liger-kernel", gpu=True).liger_fused_linear_cross_entropy
    return lambda h, head, labels, weights: function(h, head, labels, reduction="none").float() @ weights


def _cut_cross_entropy() -> Loss:
    function = module("cut_cross_entropy", "cut-cross-entropy", gpu=True).linear_cross_entropy
    # gradients are not filtered: unlearning makes predictions flat, and then the tail counts
    return lambda h, head, labels, weights: (
        function(h, head, labels, reduction="none", filter_eps=None).float() @ weights
    )


LOSSES: dict[str, Callable[[], Loss]] = {
    "logits + cross_entropy": functools.partial(_logits, False),
    "logits.float() + cross_entropy": functools.partial(_logits, True),
    "torch F.linear_cross_entropy": functools.partial(_torch_linear_loss, False),
    "torch F.linear_cross_entropy, chunked mean": functools.partial(_torch_linear_loss, True),
    "liger fused linear CE": _liger_loss,
    "cut-cross-entropy": _cut_cross_entropy,
}
