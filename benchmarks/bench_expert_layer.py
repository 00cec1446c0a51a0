"""Measure one expert layer, forward + backward + masked AdamW, against what a user has today.

The rivals take transformers' `grouped_mm` or a peer's experts, and autograd. Rival (a) multiplies every gradient by a
dense mask and gives it to torch's AdamW; since a frozen expert's gradient cannot be left out, its mask is zero. Rival
(b) takes out the trained experts' gradients, masks them, and gives them to torch's fused AdamW over compact copies
that are written back. The mask keeps half of the weights of the trained experts. Our contender computes the same from
the ops: it applies each block of the weight gradient as an update at once and never stores the gradient. Extra memory
includes the optimizer's state.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import rivals, shapes
from benchmarks.harness import OURS, Case, Work
from benchmarks.layers import Layer
from benchmarks.shapes import Geometry
from moe_unlearn.ops import AdamW, Update
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.ops.costs import expert_mlp, masked_update
from moe_unlearn.ops.expert_wgrad import Factors, expert_wgrad_adamw_

LR = 1e-5
GROUPED = "transformers grouped_mm"
DENSE, FUSED, FAIR = (f"{GROUPED} + {kind}" for kind in ("mask + AdamW", "mask + fused AdamW", "compact AdamW"))
PEER = {name: f"{name} + compact AdamW" for name in rivals.PEERS}
NAMES = (OURS, DENSE, FUSED, FAIR, *PEER.values())
# by share of trained experts: the speed-up asked for over (a), and over (b) with a peer's experts
TARGETS = {"cpu": {1.0: (2.0, None), 0.2: (3.0, None)}, "cuda": {1.0: (2.3, 1.4), 0.05: (4.4, 2.7)}}


def cases(device: str) -> list[Case]:
    if device == "cpu":
        narrow = shapes.OLMOE.narrow(4)
        rows = [(shapes.OLMOE, 1024, share, 0, 60) for share in (0.2, 1.0)]
        rows += [(narrow, tokens, 0.2, 1, 6) for tokens in (256, 512, 1024, 2048)]
        rows += [(narrow, 1024, share, 1, 6) for share in (0.05, 0.5, 1.0)]
    else:
        rows = [(shapes.QWEN3, 8192, share, 0, 6) for share in (0.05, 1.0, 0.2)]
        rows += [(shapes.QWEN3, tokens, 0.2, 1, 6) for tokens in shapes.GPU_TOKENS if tokens != 8192]
        rows += [(shapes.QWEN3, 8192, 0.5, 1, 6)]
        rows += [(g, 8192, share, 1, 6) for g in shapes.GATE[1:] for share in (0.2, 1.0)]
    return [case(*row, device) for row in rows]


def case(geometry: Geometry, tokens: int, share: float, tier: int, seconds: float, device: str) -> Case:
    return Case(
        "expert_layer",
        f"{geometry.name}, {tokens} tokens, {share:.0%} trained",
        tuple(name for name in NAMES if name != FUSED or not _whole_on_cpu(geometry, device)),
        functools.partial(work, geometry, tokens, share, device),
        tier,
        seconds,
        facts={"geometry": geometry.name, "tokens": tokens, "share": share, "routing": "uniform"},
    )


def _whole_on_cpu(geometry: Geometry, device: str) -> bool:
    # a step takes seconds at this size: only three rounds, and the rival between (a) and (b) in the narrow copies only
    return device == "cpu" and geometry is shapes.OLMOE


def work(geometry: Geometry, tokens: int, share: float, device: str) -> Work:
    layer = Layer(geometry, tokens, device=device, share=share)
    peers, missing = rivals.collected({name: rivals.EXPERTS[name] for name in (GROUPED, *rivals.PEERS)}, layer)
    contenders = {
        OURS: ours(layer),
        DENSE: dense(layer, peers[GROUPED], fused=None),
        FUSED: dense(layer, peers[GROUPED], fused=True),
        FAIR: compact(layer, peers[GROUPED]),
    }
    if _whole_on_cpu(geometry, device):
        del contenders[FUSED]
    contenders |= {PEER[name]: compact(layer, peers[name]) for name in rivals.PEERS if name in peers}
    published = geometry in shapes.GATE and (device == "cpu" or (geometry is shapes.QWEN3 and tokens == 8192))
    wanted, of_peer = TARGETS[device].get(share, (None, None)) if published else (None, None)
    parameters = sum(p.numel() for p in layer.parameters())
    return Work(
        contenders,
        {PEER[name]: why for name, why in missing.items()},
        targets={name: t for name, t in ((DENSE, wanted), *((p, of_peer) for p in PEER.values())) if t},
        flops=expert_mlp.flops(tokens * geometry.top_k, geometry.expert_weights) * (2 + share),
        # weights and both moments are in bfloat16
        bytes=expert_mlp.forward_bytes(*geometry.layer(tokens))
        + share * parameters * masked_update.bytes_per_weight(2, state=4),
        rounds=3 if _whole_on_cpu(geometry, device) else 7,
        memory=True,
    )


def ours(layer: Layer) -> Callable[[], object]:
    """Return our step, which updates in the sink of `expert_mlp` and owns its weights, packed masks and moments."""
    own = {id(p): (m, {}) for p, m in zip(layer.parameters(), layer.masks(), strict=True)}
    words = {key: pack_bits(mask[layer.trained]) for key, (mask, _) in own.items()}
    moments = {key: state for key, (_, state) in own.items()}
    del own
    experts = layer.trained.int()

    def update(weight: Tensor, factors: Factors) -> None:
        state = moments[id(weight)]
        if not state:
            shape = len(experts), *weight.shape[1:]
            state |= {name: weight.new_zeros(shape) for name in ("exp_avg", "exp_avg_sq")}
        rule, mask = AdamW(lr=LR), words[id(weight)]
        expert_wgrad_adamw_(weight, *state.values(), factors, rule, Update(step=1), experts=experts, mask=mask)

    def step() -> object:
        out = layer.ours(layer.hidden, layer.index, layer.weights, trained_experts=experts, sink=update)
        return out.detach(), *_backward(layer, out)

    return step


def dense(layer: Layer, experts: rivals.Experts, *, fused: bool | None) -> Callable[[], object]:
    """Return a step of rival (a): every gradient, a dense mask, torch's AdamW."""
    masks = layer.masks()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=LR, weight_decay=0.0, fused=fused)

    def step() -> object:
        out = experts(layer.hidden, layer.index, layer.weights)
        gradients = _backward(layer, out)
        for p, mask in zip(layer.parameters(), masks, strict=True):
            p.grad.mul_(mask)
        optimizer.step()
        optimizer.zero_grad()
        return out.detach(), *gradients

    return step


def compact(layer: Layer, experts: rivals.Experts) -> Callable[[], object]:
    """Return a step of rival (b), whose optimizer holds only the trained experts."""
    masks = [mask[layer.trained] for mask in layer.masks()]
    copies = [nn.Parameter(p.detach()[layer.trained]) for p in layer.parameters()]
    optimizer = torch.optim.AdamW(copies, lr=LR, weight_decay=0.0, fused=True)

    def step() -> object:
        out = experts(layer.hidden, layer.index, layer.weights)
        gradients = _backward(layer, out)
        for p, own, mask in zip(layer.parameters(), copies, masks, strict=True):
            own.grad = p.grad[layer.trained].mul_(mask)
            p.grad = None
        optimizer.step()
        optimizer.zero_grad()
        for p, own in zip(layer.parameters(), copies, strict=True):
            p.data.index_copy_(0, layer.trained, own.data)
        return out.detach(), *gradients

    return step


def _backward(layer: Layer, out: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of hidden states and routing weights; those of the parameters stay in the parameters."""
    out.backward(layer.upstream)
    gradients = layer.hidden.grad, layer.weights.grad
    layer.hidden.grad = layer.weights.grad = None
    return gradients
