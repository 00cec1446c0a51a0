"""Makes, fits, sizes and loads what a masked optimizer keeps of one parameter.

It keeps the count of steps, its moments, a float32 `master` copy of the weights where `numerics` asks for one, and the
`slices` that these are of, where not all train. A group's `numerics` and `state` say in what, its `offload` where: see
`optim`.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_unlearn import offload
from moe_unlearn.ops.moments import PACKED, narrowed, packed_zeros, row_bytes, widened

STATES = ("float32", "bfloat16", "int8")
_NEAREST = 0x80008000  # as random bits, what rounds to the nearest


def check_state(group: Mapping[str, Any]) -> None:
    """Raise ValueError for a `state` that is unknown or does not go with the group's `numerics`."""
    kind, numerics = group["state"], group["numerics"]
    if kind not in STATES:
        raise ValueError(f"state must be one of {STATES}; got {kind!r}")
    if kind != "float32" and numerics not in ("stochastic", "fp32_master"):
        raise ValueError(f"state {kind!r} needs numerics 'stochastic' or 'fp32_master'; got {numerics!r}")


def moment_dtype(p: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype in which the moments of a parameter lie; codes of 8 bits are packed in uint8."""
    if p.dtype == torch.float64:
        return p.dtype
    if group["state"] == "int8" and p.dim() > 1:
        return PACKED
    if group["state"] == "bfloat16":
        return torch.bfloat16
    return p.dtype if group["numerics"] == "parity" else torch.float32


def is_offloaded(p: Tensor, group: Mapping[str, Any]) -> bool:
    """Return whether moments and master weights of a parameter lie on the host, and not beside it."""
    wanted: bool = group["offload"]
    return wanted and offload.is_apart(p.device)


def needs_master(p: Tensor, group: Mapping[str, Any]) -> bool:
    """Return whether a float32 copy of the weights is kept."""
    return group["numerics"] == "fp32_master" and p.dtype not in (torch.float32, torch.float64)


def state_bytes(p: Tensor, share: float, moments: tuple[str, ...], group: Mapping[str, Any]) -> int:
    """Compute the bytes of moments and master weights of a share of a parameter's slices."""
    dtype, row = moment_dtype(p, group), p.shape[-1] if p.dim() else 1
    of_row = row_bytes(row) if dtype == PACKED else row * dtype.itemsize
    of_row = len(moments) * of_row + needs_master(p, group) * row * torch.float32.itemsize
    return round(math.prod(p.shape[:-1]) * of_row * share)


def fit_state(
    state: dict, p: Tensor, trained_slices: Tensor | None, moments: tuple[str, ...], group: Mapping[str, Any]
) -> None:
    """Fit `state` to `trained_slices`: keep the state of slices that stay, and make fresh state for the others."""
    if "step" not in state:
        state["step"] = torch.tensor(0.0)
    old, tensors = state.get("slices"), [k for k in (*moments, "master") if k in state]
    if old is not trained_slices and (old is None or trained_slices is None or not torch.equal(old, trained_slices)):
        source = torch.full((len(p),), -1, device=p.device)
        held = torch.arange(len(p), device=p.device) if old is None else old
        source[held] = torch.arange(len(held), device=p.device)
        source = source if trained_slices is None else source[trained_slices]
        for name in tensors:
            fresh = _fresh(name, p, trained_slices, state[name].dtype, group)
            there = source.to(fresh.device)
            kept = there >= 0
            fresh[kept] = _placed(state[name], p, group)[there[kept]]
            state[name] = fresh
    if trained_slices is None:
        state.pop("slices", None)
    else:
        state["slices"] = trained_slices
    for name in (*moments, *(["master"] if needs_master(p, group) else [])):
        if name in state:
            state[name] = _placed(state[name], p, group)
        else:
            state[name] = _fresh(name, p, trained_slices, moment_dtype(p, group), group)


def _fresh(name: str, p: Tensor, trained_slices: Tensor | None, dtype: torch.dtype, group: Mapping[str, Any]) -> Tensor:
    if name == "master":
        trained = p if trained_slices is None else p[trained_slices]
        return _placed(trained.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format), p, group)
    shape = p.shape if trained_slices is None else (len(trained_slices), *p.shape[1:])
    device = _home(p, group)
    made = packed_zeros(shape, device) if dtype == PACKED else torch.zeros(shape, dtype=dtype, device=device)
    return _placed(made, p, group)


def _home(p: Tensor, group: Mapping[str, Any]) -> torch.device:
    """Return where moments and master weights of a parameter lie."""
    return torch.device("cpu") if is_offloaded(p, group) else p.device


def _placed(held: Tensor, p: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Return what is held of a parameter as it lies at its home."""
    return offload.at_home(held) if is_offloaded(p, group) else held.to(p.device)


def loaded(values: dict, p: Tensor, moments: tuple[str, ...], group: Mapping[str, Any]) -> dict:
    """Copy a parameter's saved state, ours or torch's, to new tensors on its device, or on the host by `offload`.

    Moments that were saved in another form are rounded to the nearest.
    """
    state = {}
    for name, value in values.items():
        if name == "step":
            state[name] = torch.as_tensor(value, dtype=torch.float32).cpu().clone()
        elif name == "slices":
            state[name] = value.to(p.device, copy=True)
        elif name == "master" and value is not None:
            state[name] = _placed(value.detach().to(_home(p, group), torch.float32, copy=True), p, group)
        elif name in moments and value is not None:
            own = value.detach().to(_home(p, group), copy=True)
            own = _converted(own, p, moment_dtype(p, group), second=name == "exp_avg_sq")
            state[name] = _placed(own, p, group)
    if "step" not in state:
        # torch.optim.SGD counts no steps; a buffer shows that it has taken the first one
        state["step"] = torch.tensor(1.0 if "momentum_buffer" in state else 0.0)
    return state


def _converted(value: Tensor, p: Tensor, dtype: torch.dtype, *, second: bool) -> Tensor:
    """Return stored moments in another dtype."""
    if value.dtype == dtype:
        return value
    if dtype == PACKED:
        nearest = torch.full(value.shape, _NEAREST, dtype=torch.int64, device=value.device)
        return narrowed(value.float(), packed_zeros(value.shape, value.device), None, nearest, second=second)
    return widened(value, p.shape[-1] if p.dim() else 1, dtype, second=second)
