"""MaskedSGD and MaskedAdamW, torch optimizers that leave the bits of masked weights unchanged.

    optimizer = MaskedAdamW(model.parameters(), lr=1e-5, numerics="stochastic")
    optimizer.set_masks([words_or_None, ...])          # one per parameter, in the order of the groups

`group["masks"]` is a list beside `group["params"]`; it holds packed int32 words (`ops.bits`) or None. A mask belongs
to the parameter at its position and not to a tensor, so that a wrapper may replace the parameters. State exists only
for slices along dimension 0 that train: slices without a set bit (frozen experts) have none, and `state["slices"]`
lists those that have. If a mask changes later, state is carried over and new slices start from zero.

`numerics` is for parameters narrower than float32; it changes nothing for wider ones:

    parity        moments in the parameter's dtype, the bits of torch.optim.AdamW with foreach=False (SGD in
                  bfloat16 rounds once where torch also rounds lr, at places that depend on its vector loop)
    nearest       float32 moments and arithmetic, one rounding to nearest
    stochastic    the same with stochastic rounding to bfloat16: small updates survive on average
    fp32_master   a float32 copy of the trained weights is updated, the parameter is its rounding

bfloat16 keeps 8 bits, so that SGD at lr 1e-5 under "parity" or "nearest" changes next to nothing.

`state` says in what moments are kept; all but float32 need `numerics` "stochastic" or "fp32_master":

    float32       as `numerics` says; 8 bytes of AdamW's moments for each weight that trains
    bfloat16      rounded stochastically, 4 bytes
    int8          blocks of 64 codes of 8 bits and a float32 scale, 2.125 bytes; vectors keep float32

A group {"params": ..., "offload": True} keeps moments and masters of parameters on a GPU in the memory of the host
(`moe_unlearn.offload`), with the same bits. Whoever reads `state` itself calls `settle` before.

The moments of a float64 parameter are float64. `ops.moments` specifies every bit.
The formulas and the random bits are those of `ops.masked_update`; the parameter id that enters the random bits
is the position over all groups. Of a parameter that an engine shares out over ranks (`sharding`), each rank updates its
own rows with the random bits that they have in the whole parameter. The optimizers are deterministic.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from moe_unlearn.offload import Stage, pieces
from moe_unlearn.ops.bits import keep_where, slices_with_a_bit
from moe_unlearn.ops.checks import check_mask, vouch
from moe_unlearn.ops.expert_wgrad import Factors, expert_wgrad_adamw_, expert_wgrad_sgd_
from moe_unlearn.ops.masked_update import SGD, AdamW, Update, masked_adamw_, masked_sgd_
from moe_unlearn.optim_state import check_state, fit_state, is_offloaded, loaded, state_bytes
from moe_unlearn.sharding import first_row, part

# by parameter, what replaces its `.grad`: see `step`
Gradients = Mapping[Tensor, Tensor | Factors]
NUMERICS = ("parity", "nearest", "stochastic", "fp32_master")


class Layout(NamedTuple):
    """The slices along dimension 0 that train, int64 [M], and their packed mask; None where all of them do."""

    trained_slices: Tensor | None
    mask: Tensor | None


class Slot(NamedTuple):
    """A parameter's place in an optimizer, with its mask; `parameter_id` is the position over all groups."""

    group: dict
    parameter: Tensor
    mask: Tensor | None
    parameter_id: int


class Target(NamedTuple):
    """Names what an update of one parameter changes, where, and which update it is."""

    weight: Tensor
    state: dict
    mask: Tensor | None
    slices: Tensor | None
    update: Update


class _Masked(torch.optim.Optimizer):
    """Base of both optimizers: masks, compact state, the loop over parameters."""

    def __init__(self, params: Iterable, defaults: dict):
        # parameter id -> (mask, its version, layout); a cache, never saved
        self._layouts: dict[int, tuple[Tensor, int, Layout]] = {}
        # parameter -> (number of its group, place in it) when last looked up; a place is checked before its use
        self._places: dict[Tensor, tuple[int, int]] = {}
        self.zero_grad_hooks: list[Callable[[], None]] = []
        #: by device, the buffers through which state passes that lies on the host
        self.stages: dict[torch.device, Stage] = {}
        super().__init__(params, defaults | {"offload": False})

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._layouts, self._places, self.zero_grad_hooks = {}, {}, getattr(self, "zero_grad_hooks", [])
        self.stages = {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, also those that a step has collected for `step`."""
        super().zero_grad(set_to_none)
        for drop in self.zero_grad_hooks:
            drop()

    def add_param_group(self, param_group: dict) -> None:
        """Add a group as torch does; it may bring its `masks`, otherwise None for each parameter."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("masks", [None] * len(group["params"]))
        if group["numerics"] not in NUMERICS:
            raise ValueError(f"numerics must be one of {NUMERICS}; got {group['numerics']!r}")
        check_state(group)
        for name in ("lr", "weight_decay"):
            if not group[name] >= 0:
                raise ValueError(f"{name} must be at least 0; got {group[name]}")

    def set_masks(self, masks: Sequence[Tensor | None] | Mapping[int, Tensor | None]) -> None:
        """Set the mask of every parameter (a sequence) or of some (a dict by parameter id).

        Raises TypeError or ValueError, naming the parameter, for a mask that does not fit; then no mask is set.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        new = [mask for group in self.param_groups for mask in group["masks"]]
        if isinstance(masks, Mapping):
            for i, mask in masks.items():
                if not 0 <= i < len(parameters):
                    raise ValueError(f"masks name parameter {i}; there are {len(parameters)}")
                new[i] = mask
        elif len(masks) != len(parameters):
            raise ValueError(f"expected one mask or None for each of {len(parameters)} parameters; got {len(masks)}")
        else:
            new = list(masks)
        for i, (p, mask) in enumerate(zip(parameters, new, strict=True)):
            check_mask(part(p), mask, i)
        for group in self.param_groups:
            count = len(group["params"])
            group["masks"], new = new[:count], new[count:]

    @overload
    def step(self, closure: None = None, *, gradients: Gradients | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, gradients: Gradients | None = None) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, gradients: Gradients | None = None) -> float | None:
        """Update every parameter that has a gradient once; return the closure's value.

        `gradients` replace `.grad`, by parameter: a compact gradient, [M, ...] for the M slices that train, or the
        factors of an expert weight's gradient, from which the weight is updated without storing the gradient.
        Raises ValueError, before any update, for a gradient of a parameter of no group.
        """
        loss = None if closure is None else torch.enable_grad()(closure)()
        slots, gradients = [*self.slots()], {} if gradients is None else gradients
        if unknown := [list(p.shape) for p in gradients.keys() - {slot.parameter for slot in slots}]:
            raise ValueError(f"expected gradients of this optimizer's parameters; got others, of shapes {unknown}")
        for slot in slots:
            if (given := gradients.get(slot.parameter)) is not None:
                self._update(slot, given)
            elif slot.parameter.grad is not None:
                self._update(slot, part(slot.parameter.grad), whole=True)
        return loss

    def layout(self, p: Tensor) -> Layout | None:
        """Return the layout of a parameter; None for a parameter of no group."""
        slot = self._find(p)
        return None if slot is None else self._layout(slot.parameter_id, part(p), slot.mask)

    @torch.no_grad()
    def update_from(self, p: Tensor, factors: Factors, where: Tensor | None = None) -> None:
        """Update one expert weight [E, M, P] from the factors of its gradient, as `step` does.

        The gradient is never stored, and is float32 up to the update. If `where`, bool [] on the device, is False,
        only the count of steps is written. Raises ValueError for a parameter of no group.
        """
        slot = self._find(p)
        if slot is None:
            raise ValueError(f"expected a parameter of this optimizer; got one of shape {list(p.shape)}")
        self._update(slot, factors, where)

    def _find(self, p: Tensor) -> Slot | None:
        """Return the slot of a parameter; None if it is in no group."""
        place = self._places.get(p)
        if place is None or not self._is_at(p, *place):  # a wrapper may have replaced parameters
            self._places = {
                q: (k, at) for k, group in enumerate(self.param_groups) for at, q in enumerate(group["params"])
            }
            place = self._places.get(p)
        if place is None:
            return None
        number, at = place
        group = _whole(self.param_groups[number])
        return Slot(group, p, group["masks"][at], at + sum(len(g["params"]) for g in self.param_groups[:number]))

    def _is_at(self, p: Tensor, number: int, at: int) -> bool:
        """Return whether a parameter stands at this place of this group."""
        parameters = self.param_groups[number]["params"] if number < len(self.param_groups) else []
        return at < len(parameters) and parameters[at] is p

    def slots(self) -> Iterator[Slot]:
        """Yield the slot of each parameter."""
        parameter_id = 0
        for group in self.param_groups:
            for p, mask in zip(group["params"], _whole(group)["masks"], strict=True):
                yield Slot(group, p, mask, parameter_id)
                parameter_id += 1

    def _update(
        self, slot: Slot, gradient: Tensor | Factors, where: Tensor | None = None, *, whole: bool = False
    ) -> None:
        """Update one parameter; a gradient that is neither factors nor `whole` covers the trained slices alone."""
        group, p, mask, parameter_id = slot
        weight = part(p)
        trained_slices, compact_mask = self._layout(parameter_id, weight, mask)
        if trained_slices is not None and len(trained_slices) == 0:
            self.state.pop(p, None)
            return
        if isinstance(gradient, Tensor) and gradient.is_sparse:
            raise ValueError(f"parameter {parameter_id}: sparse gradients are not supported")
        if group["maximize"]:
            gradient = gradient._replace(grad=-gradient.grad) if isinstance(gradient, Factors) else -gradient
        state = self.state[p]
        if state.get("slices") is not trained_slices:
            self.settle()
        fit_state(state, weight, trained_slices, self._moments(group), group)
        state["step"] += 1
        stochastic = group["numerics"] == "stochastic" and weight.dtype not in (torch.float32, torch.float64)
        rounding = "stochastic" if stochastic else "nearest"
        update = Update(int(state["step"]), rounding, group["seed"], parameter_id, first_row(p))
        if where is not None:
            shape = weight.shape if trained_slices is None else (len(trained_slices), *weight.shape[1:])
            compact_mask = keep_where(where, compact_mask, shape)
        if whole and trained_slices is not None and isinstance(gradient, Tensor):
            gradient = gradient[trained_slices]
        target = Target(weight, state, compact_mask, trained_slices, update)
        if is_offloaded(weight, group):
            self._apply_in_pieces(group, gradient, target)
        else:
            self._apply(group, gradient, target)

    def _apply_in_pieces(self, group: dict, gradient: Tensor | Factors, to: Target) -> None:
        """Apply an update whose state lies on the host: see `offload`."""
        held = {name: to.state[name] for name in (*self._moments(group), "master") if name in to.state}
        device, count = to.weight.device, max(to.weight.shape[:1], default=1)
        if device not in self.stages:
            queued = device.type == "cuda" and not isinstance(to.weight, FakeTensor)
            self.stages[device] = Stage(device, queued=queued)
        parts = pieces(held)
        for rows in parts:
            piece, own = to, gradient
            if len(parts) > 1:
                slices = torch.arange(count, device=device) if to.slices is None else to.slices
                slices = slices[rows]
                vouch(count, slices)
                piece = to._replace(mask=None if to.mask is None else to.mask[rows], slices=slices)
                own = gradient[rows] if isinstance(gradient, Tensor) else gradient
            with self.stages[device].brought({name: kept[rows] for name, kept in held.items()}) as there:
                self._apply(group, own, piece._replace(state=there))

    def settle(self) -> None:
        """Wait until all state that lies on the host has come back there, so that it may be read."""
        for stage in self.stages.values():
            stage.settle()

    def state_dict(self) -> dict:
        """Return the state as torch does, once it has come back to the host where it lies there."""
        self.settle()
        return super().state_dict()

    def _moments(self, group: dict) -> tuple[str, ...]:
        raise NotImplementedError

    def _apply(self, group: dict, gradient: Tensor | Factors, to: Target) -> None:
        raise NotImplementedError

    def _layout(self, parameter_id: int, p: Tensor, mask: Tensor | None) -> Layout:
        if mask is None:
            return Layout(None, None)
        known = self._layouts.get(parameter_id)
        if known is not None and known[0] is mask and known[1] == mask._version:
            return known[2]
        check_mask(p, mask, parameter_id)
        trained_slices = slices_with_a_bit(p, mask)
        if trained_slices is not None:
            vouch(max(p.shape[:1], default=1), trained_slices)
        compact = mask if trained_slices is None else mask[trained_slices]
        whole = bool((compact == -1).all()) and p.dim() and p.shape[-1] % 32 == 0  # every weight of these slices trains
        self._layouts[parameter_id] = (mask, mask._version, Layout(trained_slices, None if whole else compact))
        return self._layouts[parameter_id][2]

    def state_size(self, p: Tensor, mask: Tensor | None) -> int:
        """Compute the bytes of moments and master weights that `p` has, or will have under `mask`."""
        slot = self._find(p)
        assert slot is not None
        group = slot.group
        trained_slices = None if mask is None else slices_with_a_bit(p, mask)
        share = 1 if trained_slices is None else len(trained_slices) / max(len(p), 1) if p.dim() else 0
        return state_bytes(p, share, self._moments(group), group)

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state as torch does, bit for bit, or one of torch.optim.AdamW or SGD, which has no masks.

        Options that the saved groups lack (masks, numerics, ...) keep their present values, as `offload` always does.
        """
        self.settle()
        own = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        # strict=False: torch reports a different number of groups
        both = zip(own, state_dict["param_groups"], strict=False)
        groups = [mine | saved | {"offload": mine["offload"]} for mine, saved in both]
        masks = [group.pop("masks") for group in groups]  # of which torch would make copies
        groups += state_dict["param_groups"][len(own) :]
        # without the state: torch would cast float32 moments to the dtype of the parameter
        super().load_state_dict(state_dict | {"param_groups": groups, "state": {}})
        owner = {
            i: (p, group)
            for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True)
            for i, p in zip(saved["params"], group["params"], strict=True)
        }
        for group, given in zip(self.param_groups, masks, strict=True):
            pairs = zip(given, group["params"], strict=True)
            group["masks"] = [mask if mask is None else mask.to(p.device) for mask, p in pairs]
        for i, values in state_dict["state"].items():
            p, group = owner[int(i)]
            self.state[p] = loaded(values, p, self._moments(group), group)


class MaskedSGD(_Masked):
    """SGD under packed masks; options as in torch.optim.SGD, `numerics` and `state` as in the module docstring.

    Raises ValueError for an option out of range.
    """

    def __init__(
        self, params: Iterable, lr: float = 1e-3, momentum: float = 0.0, dampening: float = 0.0,
        weight_decay: float = 0.0, nesterov: bool = False, *, maximize: bool = False, numerics: str = "parity",
        state: str = "float32", seed: int = 0,
    ):  # fmt: skip
        if not momentum >= 0:
            raise ValueError(f"momentum must be at least 0; got {momentum}")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("nesterov needs momentum above 0 and dampening 0")
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        common = {"nesterov": nesterov, "maximize": maximize, "numerics": numerics, "state": state, "seed": seed}
        super().__init__(params, defaults | common)

    def _moments(self, group: dict) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _rule(self, group: dict) -> SGD:
        names = "momentum", "dampening", "weight_decay", "nesterov"
        return SGD(float(group["lr"]), *(group[name] for name in names))

    def _apply(self, group: dict, gradient: Tensor | Factors, to: Target) -> None:
        weight, state, mask, slices, update = to
        buffer, master, rule = state.get("momentum_buffer"), state.get("master"), self._rule(group)
        if isinstance(gradient, Factors):
            expert_wgrad_sgd_(weight, buffer, gradient, rule, update, experts=slices, mask=mask, master=master)
        else:
            masked_sgd_(weight, gradient, buffer, mask, rule, update, master=master, slices=slices)


class MaskedAdamW(_Masked):
    """AdamW under packed masks; options as in torch.optim.AdamW, `numerics` and `state` as in the module docstring.

    Raises ValueError for an option out of range.
    """

    def __init__(
        self, params: Iterable, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, *, maximize: bool = False, numerics: str = "parity", state: str = "float32",
        seed: int = 0,
    ):  # fmt: skip
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1); got {betas}")
        if not eps >= 0:
            raise ValueError(f"eps must be at least 0; got {eps}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"maximize": maximize, "numerics": numerics, "state": state, "seed": seed})

    def _moments(self, group: dict) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _rule(self, group: dict) -> AdamW:
        beta1, beta2 = group["betas"]
        return AdamW(float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"])

    def _apply(self, group: dict, gradient: Tensor | Factors, to: Target) -> None:
        weight, state, mask, slices, update = to
        m, v, master, rule = state["exp_avg"], state["exp_avg_sq"], state.get("master"), self._rule(group)
        if isinstance(gradient, Factors):
            expert_wgrad_adamw_(weight, m, v, gradient, rule, update, experts=slices, mask=mask, master=master)
        else:
            masked_adamw_(weight, gradient, m, v, mask, rule, update, master=master, slices=slices)


def _whole(group: dict) -> dict:
    """Return the group; ValueError unless it has a mask for each parameter."""
    if len(group["masks"]) != len(group["params"]):
        raise ValueError(f"a group has {len(group['params'])} parameters but {len(group['masks'])} masks")
    return group
