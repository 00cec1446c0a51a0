"""The router lever in a step: gradients of routers, and routers after each update, keep what `routers.kept` says."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from moe_unlearn import routers
from moe_unlearn.config import Recipe, Router
from moe_unlearn.model.batches import Batch
from moe_unlearn.model.modes import evaluation_mode
from moe_unlearn.ops.bits import unpack_bits
from moe_unlearn.optim import MaskedAdamW, MaskedSGD
from moe_unlearn.prepare.preparation import Preparation
from moe_unlearn.ranks import Ranks
from moe_unlearn.routers import Kept


class RouterGuard:
    """Keeps routers invariant under one optimizer, whoever steps it, and measures how stable routes are.

    Without `router.mode: invariant` routers are left alone. Raises ValueError for that where ranks share weights out.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, optimizer: MaskedSGD | MaskedAdamW, *, shared: bool):
        self.model, self.optimizer, self.settings = model, optimizer, recipe.router
        #: the retain rows that `prepare` was called with
        self.rows: Sequence[Batch] = ()
        self._held: dict[Tensor, Kept] = {}
        self._wanted, self._said = recipe.router.mode == "invariant", False
        routers.check_whole(recipe.router, shared=shared)
        self._hook = optimizer.register_step_post_hook(self._after) if self._wanted else None

    def __deepcopy__(self, memo: dict) -> "RouterGuard":
        """Return a guard that does nothing, for a rehearsal: what is kept is counted by the plan itself."""
        made = object.__new__(RouterGuard)
        made.model, made.optimizer, made.settings, made.rows = self.model, self.optimizer, Router(), ()
        made._held = {}
        made._wanted, made._said, made._hook = False, True, None
        return made

    def take(self, prepared: Preparation, masks: Mapping[str, Tensor]) -> None:
        """Take up what is prepared, restricted to the weights that the packed `masks` by name let move.

        Raises ValueError for routers narrower than float32 without float32 masters.
        """
        if not self._wanted or prepared.routers is None:
            return
        named = dict(self.model.named_parameters())
        numerics = {p: group["numerics"] for group in self.optimizer.param_groups for p in group["params"]}
        self._held = {}
        for name, kept in prepared.routers.items():
            p = named[name]
            if not p.requires_grad:
                continue
            if torch.finfo(p.dtype).bits < 32 and numerics.get(p) != "fp32_master":
                raise ValueError(
                    f"router.mode invariant needs float32 masters of {name}, which is {str(p.dtype)[6:]}: expected "
                    f"its group with numerics fp32_master; got {numerics.get(p)}"
                )
            words = masks.get(name)
            self._held[p] = kept if words is None else routers.restricted(kept, unpack_bits(words, p.shape[1]))
        if not self._said and (said := routers.closed(self._held.values())):
            warnings.warn(f"{said}: router.energy or router.rank less", stacklevel=3)
            self._said = True

    @property
    def changes(self) -> dict[Tensor, Callable[[Tensor], Tensor]]:
        """Return by router what makes of its gradient [E, H] the part that no kept direction has."""
        return {p: partial(_projected, kept=kept) for p, kept in self._held.items()}

    def held(self, p: Tensor, rows: Tensor, slices: Tensor | None) -> Tensor:
        """Return the rows [M, H] of a parameter after an update, those of `slices`, as the guard leaves them."""
        kept = self._held.get(p)
        return rows if kept is None else routers.hold(rows, kept.of(slices))

    def measure(self, prepared: Preparation, masks: Mapping[str, Tensor], steps: int, ranks: Ranks) -> dict[str, float]:
        """Return the metric `routing_stability` where it is due after so many steps; find anew what is kept if need be.

        Warns where the rows are not known, since the step was loaded and not prepared with them.
        """
        every, least = self.settings.stability_every, self.settings.refresh_below
        if not every or steps % every or prepared.routes is None:
            return {}
        if not self.rows:
            warnings.warn(
                "routing stability is not measured: call prepare() with the same rows after load_state_dict()",
                stacklevel=2,
            )
            return {}
        with evaluation_mode(self.model):
            now = routers.routes(self.model, routers.watched_batches(self.rows))
            share = ranks.said_by_first(partial(routers.stability, prepared.routes, now))
            if least is not None and share < least:
                prepared.routers = {
                    name: self._from_master(name, kept)
                    for name, kept in routers.collect(self.model, self.rows, self.settings).items()
                }
                ranks.share_(prepared.chosen())
                self.take(prepared, masks)
        return {"routing_stability": share}

    def correct(self, prepared: Preparation, masks: Mapping[str, Tensor], ranks: Ranks) -> dict[str, float]:
        """Correct the routers as `routers.ridge` says; return the metrics `routing_stability` and that before it.

        A correction that leaves fewer routes as they were than there are is undone. Raises RuntimeError where the rows
        are not known, or nothing was prepared for it.
        """
        if prepared.router_logits is None or prepared.routes is None or not self.rows:
            raise RuntimeError("routers can be corrected after prepare() with the retain rows and router.correct alone")
        named, batches = dict(self.model.named_parameters()), routers.watched_batches(self.rows)
        with evaluation_mode(self.model), torch.no_grad():
            shares = [routers.stability(prepared.routes, routers.routes(self.model, batches))]
            before = prepared.router_logits
            free = {name: unpack_bits(masks[name], named[name].shape[1]) for name in before.keys() & masks.keys()}
            made = routers.corrected(self.model, batches, before, self.settings.ridge, free)
            ranks.share_(made.values())
            former = {name: named[name].detach().clone() for name in made}
            for name, weight in made.items():
                named[name].copy_(weight)
            shares.append(routers.stability(prepared.routes, routers.routes(self.model, batches)))
            uncorrected, corrected = ranks.said_by_first(lambda: shares)
            if corrected < uncorrected:
                for name, weight in former.items():
                    named[name].copy_(weight)
                corrected = uncorrected
        return {"routing_stability": corrected, "routing_stability_uncorrected": uncorrected}

    def _from_master(self, name: str, kept: Kept) -> Kept:
        """Return what is kept with changes counted from the float32 master of the weight, where it has one."""
        state = self.optimizer.state.get(dict(self.model.named_parameters())[name], {})
        if "master" in state:
            kept.weight[state["slices"] if "slices" in state else slice(None)] = state["master"].to(kept.weight)
        return kept

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: tuple, keywords: dict) -> None:
        """Have each router that an update has just moved keep what it keeps."""
        for p in self._held:
            if p.grad is None:
                continue
            state = self.optimizer.state[p]
            slices, master = state.get("slices"), state.get("master")
            rows = p if slices is None else p[slices]
            made = self.held(p, rows if master is None else master, slices)
            if master is not None:
                master.copy_(made)
            if slices is None:
                p.copy_(made)
            else:
                p[slices] = made.to(p.dtype)

    def close(self) -> None:
        """Leave the optimizer alone from now on."""
        if self._hook is not None:
            self._hook.remove()


def _projected(gradient: Tensor, kept: Kept) -> Tensor:
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return routers.off(wide if kept.free is None else wide * kept.free, kept.basis)
