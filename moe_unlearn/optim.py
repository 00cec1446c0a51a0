"""MaskedSGD and MaskedAdamW: torch optimizers whose masked weights keep their bits.

`group["masks"]` is a list beside `group["params"]` of packed int32 words (`ops.bits`) or None; a position,
never a tensor, ties the two, so that a wrapper may replace the parameters. Slices along dimension 0 whose
mask is all zero have no state at all. Maths and numerics: `ops.masked_update`.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from moe_unlearn.ops.bits import num_words
from moe_unlearn.ops.masked_update import masked_adamw_, masked_sgd_

NUMERICS = ("parity", "stochastic", "fp32_master")


class _Masked(torch.optim.Optimizer):
    """What the two share: masks, compact state, the loop over parameters."""

    moments: tuple[str, ...] = ()

    def __init__(self, params: Iterable, defaults: dict):
        if defaults["numerics"] not in NUMERICS:
            raise ValueError(f"numerics must be one of {NUMERICS}; got {defaults['numerics']!r}")
        for name in ("lr", "weight_decay"):
            if not defaults[name] >= 0:
                raise ValueError(f"{name} must be at least 0; got {defaults[name]}")
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        """As in torch; a group without masks gets None for each parameter."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("masks", [None] * len(group["params"]))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None):
        """One update of every parameter that has a gradient; returns the closure's value."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameter_id = 0
        for group in self.param_groups:
            if len(group["masks"]) != len(group["params"]):
                raise ValueError(
                    f"a group has {len(group['params'])} parameters but {len(group['masks'])} masks"
                )
            for p, mask in zip(group["params"], group["masks"], strict=True):
                if p.grad is not None:
                    self._update(group, p, mask, parameter_id)
                parameter_id += 1
        return loss

    def _update(self, group: dict, p: Tensor, mask: Tensor | None, parameter_id: int) -> None:
        if p.grad.is_sparse:
            raise ValueError(f"parameter {parameter_id}: sparse gradients are not supported")
        _check_mask(p, mask, parameter_id)
        state = self.state[p]
        if not state:
            self._new_state(group, p, mask, state)
        slices = state.get("slices")
        grad = p.grad
        if slices is not None:
            grad, mask = grad[slices], mask[slices]
            if not len(slices):
                return
        state["step"] += 1
        stochastic = group["numerics"] == "stochastic" and p.dtype == torch.bfloat16
        options = {
            "lr": float(group["lr"]),
            "step": int(state["step"]),
            "weight_decay": group["weight_decay"],
            "rounding": "stochastic" if stochastic else "nearest",
            "seed": group["seed"],
            "parameter_id": parameter_id,
            "master": state.get("master"),
            "slices": slices,
        }
        self._apply(group, p, grad, mask, state, options)

    def _new_state(self, group: dict, p: Tensor, mask: Tensor | None, state: dict) -> None:
        state["step"] = torch.tensor(0.0)
        own = p
        if mask is not None and p.dim() > 0:
            trained = mask.flatten(1).ne(0).any(1) if mask.dim() > 1 else mask.ne(0).any().expand(len(p))
            if not trained.all():
                state["slices"] = trained.nonzero().flatten()
                own = p[state["slices"]]
        dtype = _state_dtype(group, p)
        for name in self._moments(group):
            state[name] = torch.zeros_like(own, dtype=dtype, memory_format=torch.contiguous_format)
        if group["numerics"] == "fp32_master":
            state["master"] = own.detach().to(dtype, copy=True)

    def state_size(self, p: Tensor, mask: Tensor | None) -> int:
        """Bytes of state `p` has, or will have under `mask`."""
        group = next(g for g in self.param_groups if any(q is p for q in g["params"]))
        elements = p.numel()
        if mask is not None and mask.dim() > 1:
            trained = int(mask.flatten(1).ne(0).any(1).sum())
            elements = elements // max(len(p), 1) * trained
        width = torch.empty((), dtype=_state_dtype(group, p)).element_size()
        copies = len(self._moments(group)) + (group["numerics"] == "fp32_master")
        return elements * width * copies

    def load_state_dict(self, state_dict: dict) -> None:
        """As in torch, but state keeps its own dtype: torch would cast float32 moments to the parameter's."""
        super().load_state_dict(state_dict)
        saved = dict(enumerate(p for group in self.param_groups for p in group["params"]))
        for i, values in state_dict["state"].items():
            own = self.state[saved[int(i)]]
            for name, value in values.items():
                if isinstance(value, Tensor):
                    device = saved[int(i)].device if name != "step" else value.device
                    own[name] = value.detach().to(device, copy=True)

    def _moments(self, group: dict) -> tuple[str, ...]:
        return self.moments


class MaskedSGD(_Masked):
    """SGD under packed masks; options as torch.optim.SGD, `numerics` and `seed` as `ops.masked_update`."""

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        numerics: str = "parity",
        seed: int = 0,
    ):
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("nesterov needs momentum above 0 and dampening 0")
        super().__init__(params, {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": nesterov, "numerics": numerics, "seed": seed,
        })  # fmt: skip

    def _moments(self, group: dict) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _apply(self, group, p, grad, mask, state, options) -> None:
        masked_sgd_(
            p, grad, state.get("momentum_buffer"), mask, momentum=group["momentum"],
            dampening=group["dampening"], nesterov=group["nesterov"], **options,
        )  # fmt: skip


class MaskedAdamW(_Masked):
    """AdamW under packed masks; options as torch.optim.AdamW, `numerics` and `seed` as `ops.masked_update`."""

    moments = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        numerics: str = "parity",
        seed: int = 0,
    ):
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1); got {betas}")
        super().__init__(params, {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "numerics": numerics,
            "seed": seed,
        })  # fmt: skip

    def _apply(self, group, p, grad, mask, state, options) -> None:
        masked_adamw_(
            p, grad, state["exp_avg"], state["exp_avg_sq"], mask, betas=tuple(group["betas"]),
            eps=group["eps"], **options,
        )  # fmt: skip


def _state_dtype(group: dict, p: Tensor) -> torch.dtype:
    if group["numerics"] == "parity":
        return p.dtype
    return torch.promote_types(p.dtype, torch.float32)


def _check_mask(p: Tensor, mask: Tensor | None, parameter_id: int) -> None:
    if mask is None:
        return
    words = (*p.shape[:-1], num_words(p.shape[-1])) if p.dim() else (1,)
    if mask.dtype != torch.int32 or mask.shape != words:
        raise ValueError(
            f"parameter {parameter_id} of shape {list(p.shape)}: mask must be int32 words {list(words)}; "
            f"got {mask.dtype} {list(mask.shape)}"
        )
