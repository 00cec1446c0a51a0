"""Losses of a recipe on one pair of batches, each a scalar with its graph.

Names: `forget` (`config.FORGET_OBJECTIVES`), `retain` (NLL, KL or RMU's embedding difference), `kl` (MOLLM's
third objective), `hold` (what keeps the unseen text of level), `anchor` (SEUF) and `router_aux` (the load-balancing
loss). The formulas are in `losses`, `seuf` and `router_aux`; this module applies them to batches, reference caches and
TRACE's token weights:

    L_retain = sum_t w_t l_t / (number of retain positions)

Each loss is a mean over its own unit: positions that carry a loss, sequences for NPO, SimNPO, DPO and where level
compares sequences, labelled tokens for RMU, attended positions for SEUF's anchor and the load-balancing loss. `units`
counts these, so that each part of a split batch is weighed by its number of units. RMU steers and keeps the states of
labelled tokens, or of the tokens marked by a batch's `state_mask` [B, S].
"""

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from moe_unlearn import losses, router_aux, seuf, trace
from moe_unlearn.config import COMPARE_COMPANIONS, Recipe
from moe_unlearn.errors import NotPreparedError
from moe_unlearn.experts import experts_modules, step_inputs, total_experts
from moe_unlearn.model.admissible import check_values
from moe_unlearn.model.batches import Batch, attended_mask, forgotten, refusal, stack, state_mask, target_mask
from moe_unlearn.model.head import final_hidden_states, token_losses
from moe_unlearn.model.packing import Call, call_of
from moe_unlearn.model.states import control_vector, layer_states, sequence_logprobs
from moe_unlearn.prepare.float8 import unpacked
from moe_unlearn.prepare.preparation import CACHED_SIDES, Preparation
from moe_unlearn.prepare.rows import RowCache
from moe_unlearn.step import level
from moe_unlearn.step.dual import Multiplier

# the largest share of a joint forward pass's positions that may be padding which separate passes would not have
LARGEST_PADDING = 0.125
# forget objectives that average a function of each token's NLL over positions; the NLL is 0 at positions without a loss
TOKEN_LOSSES = {
    "wga": lambda nll, forget: losses.wga(nll, forget.beta),
    "satimp": lambda nll, forget: losses.satimp(nll, forget.beta1, forget.beta2),
}


_Found = TypeVar("_Found")


class _Targets(TypedDict, total=False):
    """Holds what `token_losses` compares a model with: states and head of a reference, a penalty of the label."""

    ref_hidden_states: Tensor
    ref_lm_head: Tensor | None
    ref_bias: Tensor | None
    label_penalty: float


class Objectives:
    """Evaluates a recipe's objectives on batches with the model it was made for.

    Called with a forget and a retain batch, it returns all losses. Both sides go through one forward pass where they
    can: sequences never mix, and padding is on the right. `separate` gives the reason where they cannot.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, prepared: Preparation):
        self.model, self.recipe, self.prepared = model, recipe, prepared
        #: for each MoE layer int64 [2, E]: how often each expert was visited in the last joint forward pass by
        #: positions that carry a forget loss (row 0) or a retain loss (row 1)
        self.tokens_per_expert: list[Tensor] = []
        #: coefficient of the load-balancing loss in the retain loss; at 0 that loss is not computed
        self.router_aux = router_aux.coefficient(model, recipe)
        #: multiplier of the retain loss, a variable with `recipe.dual`
        self.dual = Multiplier(recipe.dual, recipe.retain.alpha)

    @property
    def factors(self) -> dict[str, float]:
        """Return the coefficient of each loss in their weighted sum, which is used without MOLLM."""
        recipe = self.recipe
        alpha = self.dual.value
        return {
            "forget": recipe.forget.gamma,
            "retain": alpha,
            "router_aux": alpha * self.router_aux,
            "hold": recipe.forget.gamma * recipe.forget.hold,
            "anchor": recipe.scope.anchor,
        }

    def weighed(self, values: Mapping[str, float | Tensor]) -> float | Tensor:
        """Compute the weighted sum of losses by name, which a step without MOLLM minimises; MOLLM's KL counts once."""
        factors = self.factors
        return sum(factors.get(name, 1.0) * value for name, value in values.items()) - self.dual.offset

    def merged(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the losses by MOLLM's objectives: hold, anchor and router_aux are part of another objective.

        Their factors do not include that objective's own.
        """
        merged, parts = (
            dict(values),
            {
                "hold": ("forget", self.recipe.forget.hold),
                "anchor": ("forget", self.factors["anchor"]),
                "router_aux": ("retain", self.router_aux),
            },
        )
        for name, (whole, factor) in parts.items():
            if name in merged:
                merged[whole] = merged[whole] + factor * merged.pop(name)
        return merged

    @property
    def separate(self) -> str:
        """Return why forget and retain rows need separate forward passes; empty if they can share one."""
        recipe = self.recipe
        if recipe.mollm is not None:
            return "MOLLM goes backward once for each objective, which would walk the other side's rows in vain"
        if recipe.scope.kind == "seuf":
            return "SEUF's anchor reads the gates of the forget rows"
        if recipe.retain.objective == "none":
            return "no retain objective"
        if (recipe.forget.objective == "rmu") != (recipe.retain.objective == "embed_diff"):
            return "RMU's forward stops at its layer, the retain objective's goes on to the head"
        return ""

    def __call__(self, forget: Batch, retain: Batch, *, joint: bool = True) -> dict[str, Tensor]:
        """Compute the losses of one pair of batches, by name; `joint=False` keeps the forward passes separate."""
        forget = forgotten(self.recipe, forget)
        parts = self._parts(forget, retain)
        if not joint or not self._fits(parts):
            return {**self._forget_side(forget), **self.retain(retain)}
        stacked, rows = stack(parts)
        group = torch.full_like(stacked["input_ids"], -1, dtype=torch.int32)
        for side, (part, batch) in enumerate(((rows[0], forget), (rows[-1], retain))):
            mask = target_mask(batch)
            group[part, : mask.shape[1]].masked_fill_(mask, side)
        layer = self._layer("rmu", self.recipe.forget.objective)
        call, length = call_of(stacked), retain["input_ids"].shape[1]
        with self._routing() as routing:
            states, log_weight = self._states(stacked, call, self._tilt(retain), group, layer)
        routing = [of_layer.rows(call, rows[-1], length) for of_layer in routing]
        *others, kept = [states[r, : b["input_ids"].shape[1]] for r, b in zip(rows, parts, strict=True)]
        if log_weight is not None:
            log_weight = log_weight[rows[-1], :length]
        return {**self._forget_side(forget, *others), **self.retain(retain, kept, log_weight, routing)}

    def joint(self, forget: Batch, retain: Batch) -> bool:
        """Return whether the sides of a pair of batches go through one forward pass."""
        return self._fits(self._parts(forgotten(self.recipe, forget), retain))

    def _fits(self, parts: list[Batch]) -> bool:
        return not self.separate and _padded_share(parts) <= LARGEST_PADDING

    def _parts(self, forget: Batch, retain: Batch) -> list[Batch]:
        """Return the batches of a forward pass; `forget` are the rows that carry the forget loss."""
        refused = [refusal(forget)] if self.recipe.forget.objective in COMPARE_COMPANIONS else []
        return [forget, *refused, retain]

    def units(self, forget: Batch, retain: Batch) -> dict[str, Tensor]:
        """Count the units that the losses of a pair of batches are means over, int64 [] each, by name.

        The names are "forget", "retain", and "hold", "anchor" and "router_aux" where these are computed. Units are
        sequences for sequence losses, else positions; a loss without a unit of its own has that of "retain".
        """
        rows, objective = forgotten(self.recipe, forget), self.recipe.forget.objective
        counted = {"rmu": state_mask, "logit_margin": losses.margin_mask}.get(objective, target_mask)(rows)
        kept = state_mask(retain) if self.recipe.retain.objective == "embed_diff" else target_mask(retain)
        out = {"forget": counted.sum(), "retain": kept.sum()}
        if objective in ("npo", "simnpo", "idk_dpo"):
            out["forget"] = torch.full_like(out["retain"], len(counted))
        if objective == "level":
            out |= level.units(self.recipe.forget, rows)
        if self.recipe.scope.kind == "seuf":
            out["anchor"] = attended_mask(rows).sum()
        if self.router_aux:
            out["router_aux"] = attended_mask(retain).sum()
        return out

    def check(self, forget: Sequence[Batch], retain: Sequence[Batch]) -> None:
        """Raise ValueError for what the model cannot take, and for a side without a unit of its loss."""
        for side, batches in (("forget", forget), ("retain", retain)):
            for batch in batches:
                check_values(batch, side, self.model, alone=False)
        settings, kept = self.recipe.forget, self.recipe.retain.objective
        if settings.objective == "level":
            level.check(forget)
        if not any(self.units(batch, retain[0])["forget"] for batch in forget):
            first = f"forget.ignore_first_n_answer_tokens is {settings.ignore_first_n_answer_tokens}"
            why = {
                "ceu": f"{first}, which leaves no predicted token of any row: lower it",
                "idk_nll": "the labels of its refusals are all -100",
            }.get(settings.objective, "its state_mask is false everywhere")
            raise ValueError(f"the forget set carries no {settings.objective} loss: {why}")
        if not any(self.units(forget[0], batch)["retain"] for batch in retain):
            raise ValueError(f"the retain set carries no {kept} loss: its state_mask is false everywhere")

    def check_cached(self, forget: Batch, retain: Batch) -> None:
        """Raise ValueError if a value that the losses look up for a row of these batches was not prepared."""
        sides = {"forget": forget, "retain": retain}
        for name, side in CACHED_SIDES.items():
            cache: RowCache | None = getattr(self.prepared, name)
            if cache is not None:
                batch = refusal(forget) if side == "refusals" else sides[side]
                if name.removesuffix("_forget") not in batch:  # the batch may bring values of its own
                    cache.known_keys(batch)

    def forget(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the losses of the forget side: {"forget": loss}, with "hold" for level and "anchor" for SEUF."""
        return self._forget_side(forgotten(self.recipe, batch))

    def _forget_side(self, batch: Batch, *states: Tensor) -> dict[str, Tensor]:
        """Compute `forget` on the rows that carry its loss; given `states` [B, S, H] replace the forward passes."""
        if self.recipe.scope.kind != "seuf":
            return self._forget_losses(batch, *states)
        layer, expert = self._need("seuf", self.prepared.selected).nonzero()[0].tolist()
        name = list(experts_modules(self.model))[layer]
        with seuf.gates(self.model, [name]) as collected:
            computed = self._forget_losses(batch)
        # where there are several forward passes (DPO), the first gate is kept, which is that of the batch itself
        gate = call_of(batch).rows(collected[name].dense()).flatten(0, 1)
        return computed | {"anchor": seuf.anchor_loss(gate, expert, attended_mask(batch).flatten())}

    def retain(
        self,
        batch: Batch,
        states: Tensor | None = None,
        log_weight: Tensor | None = None,
        routing: list[router_aux.Layer] | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses of the retain side: {"retain": loss}, with "kl" added for MOLLM and "router_aux" if used.

        All come from one forward pass, or from its given results: `states` [B, S, H], TRACE's `log_weight` [B, S] and
        the `routing`.
        """
        objective, with_kl = self.recipe.retain.objective, self.recipe.mollm is not None and self.recipe.mollm.kl
        if objective == "none" and not with_kl:
            return {}
        if states is None:
            call, layer = call_of(batch), self._layer("embed_diff", objective)
            with self._routing() as routing:
                states, log_weight = self._states(batch, call, self._tilt(batch), layer=layer)
            routing = [of_layer.rows(call, slice(None), states.shape[1]) for of_layer in routing]
        if objective == "embed_diff":
            reference = self._need("reference", self.prepared.ref_layer_states).get(batch)
            return {"retain": losses.embed_diff(states, reference.to(states.dtype), state_mask(batch))}
        positions, out = target_mask(batch).sum().clamp_min(1), {}
        if objective != "none":
            weights = self._token_weights(batch, log_weight)
            out["retain"] = self._token_sum(batch, states, objective, weights) / positions
        if with_kl:
            out["kl"] = self._token_sum(batch, states, "kl", None) / positions
        if self.router_aux:
            assert routing is not None  # states come with the routing of their forward pass
            out["router_aux"] = router_aux.load_balancing_loss(routing, attended_mask(batch).flatten())
        return out

    def _routing(self) -> contextlib.AbstractContextManager[list[router_aux.Layer]]:
        """Return a context that collects the routing of a forward pass for the load-balancing loss, if that is used."""
        return router_aux.routing(self.model) if self.router_aux else contextlib.nullcontext([])

    def _states(
        self,
        batch: Batch,
        call: Call,
        tilt: Tensor | None = None,
        group: Tensor | None = None,
        layer: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Run one forward pass; return hidden states [B, S, H], final or after RMU's layer, and log_weight [B, S]."""
        device = call.attended.device
        log_weight = None if tilt is None else torch.zeros(call.shape.numel(), device=device)
        counts = None
        if group is not None:
            group = call.tokens(group, -1)
            modules: Iterable[Any] = experts_modules(self.model).values()
            counts = self.tokens_per_expert = [
                torch.zeros(2, total_experts(module), dtype=torch.int64, device=device) for module in modules
            ]
        with step_inputs(
            self.model,
            group=group,
            num_groups=1 if group is None else 2,
            tokens_per_expert=counts,
            log_tilt=tilt,
            log_weight=log_weight,
        ):
            if layer is None:
                states = final_hidden_states(self.model, batch, call)
            else:
                states = layer_states(self.model, batch, layer, call)
        return states, None if log_weight is None else call.rows(log_weight)

    def _layer(self, kind: str, objective: str) -> int | None:
        return self.recipe.forget.layer if objective == kind else None

    def _token_sum(self, batch: Batch, states: Tensor, kind: str, weights: Tensor | None) -> Tensor:
        targets: _Targets = {}
        if kind == "kl":
            targets = self._reference_states(batch, states, self.prepared.ref_hidden_states)
        per_token = token_losses(self.model, batch, kind=kind, token_weights=weights, hidden_states=states, **targets)
        return per_token.sum()

    def _tilt(self, batch: Batch) -> Tensor | None:
        """Return TRACE's tilt if token weights are computed during the forward pass, else None."""
        settings = self.recipe.trace
        if settings is None or self.prepared.inactive or settings.refresh == "offline" or "token_weights" in batch:
            return None
        return self._need("trace", self.prepared.calibration).tilt.float()

    def _token_weights(self, batch: Batch, log_weight: Tensor | None) -> Tensor | None:
        settings = self.recipe.trace
        if "token_weights" in batch or settings is None or self.prepared.inactive:
            return batch.get("token_weights")
        if settings.refresh == "offline":
            return self._need("trace", self.prepared.token_weights).get(batch)
        state = self._need("trace", self.prepared.calibration)
        assert log_weight is not None  # a forward pass with TRACE's tilt adds it up
        return trace.online_weights(log_weight, state.bias, settings.cap or state.largest_weight)

    def _forget_losses(self, batch: Batch, *states: Tensor) -> dict[str, Tensor]:
        """Compute the losses of the rows that carry a forget loss, by name."""
        if self.recipe.forget.objective != "level":
            return {"forget": self._forget(batch, *states)}
        former = self._need("reference", self.prepared.ref_logprobs_idk)
        return level.level(self.model, self.recipe.forget, batch, former, *states)

    def _forget(self, batch: Batch, states: Tensor | None = None, states_idk: Tensor | None = None) -> Tensor:
        settings = self.recipe.forget
        if states is None:
            states = self._states(batch, call_of(batch), layer=self._layer("rmu", settings.objective))[0]
        if settings.objective == "rmu":
            control = control_vector(self.recipe.seed, settings.steering, states.shape[-1]).to(states)
            return losses.rmu(states, control, state_mask(batch))
        if settings.objective == "logit_margin":
            return losses.logit_margin(self.model, batch, states)
        positions = target_mask(batch).sum().clamp_min(1)
        if settings.objective in ("ga", "idk_nll", "uce"):
            kind = "uce" if settings.objective == "uce" else "nll"
            per_token = token_losses(self.model, batch, kind=kind, hidden_states=states)
            mean = per_token.sum() / positions
            return -mean if settings.objective == "ga" else mean
        if settings.objective in ("ceu", "undial"):
            targets: _Targets = {"label_penalty": math.inf}
            if settings.objective == "undial":
                targets = self._reference_states(batch, states, self.prepared.ref_hidden_states_forget)
                targets["label_penalty"] = settings.beta
            return token_losses(self.model, batch, kind="ce", hidden_states=states, **targets).sum() / positions
        if settings.objective in TOKEN_LOSSES:
            per_token = token_losses(self.model, batch, kind="nll", hidden_states=states)
            return TOKEN_LOSSES[settings.objective](per_token, settings).sum() / positions
        sequences = sequence_logprobs(self.model, batch, states)
        if settings.objective == "simnpo":
            lengths = target_mask(batch).sum(1)
            return losses.simnpo(sequences, lengths, settings.beta, settings.delta)
        reference = self._reference_logprobs(batch)
        if settings.objective == "npo":
            return losses.npo(sequences, reference, settings.beta)
        idk = refusal(batch)
        return losses.idk_dpo(
            sequence_logprobs(self.model, idk, states_idk),
            self._need("reference", self.prepared.ref_logprobs_idk).get(idk).sum(1),
            sequences,
            reference,
            settings.beta,
        )

    def _reference_states(self, batch: Batch, states: Tensor, cache: RowCache | None) -> _Targets:
        given = batch.get("ref_hidden_states")
        if given is None:
            given = unpacked(self._need("reference", cache).get(batch))
        prepared = self.prepared
        return {
            "ref_hidden_states": given.to(states.dtype),
            "ref_lm_head": prepared.ref_lm_head,
            "ref_bias": prepared.ref_bias,
        }

    def _reference_logprobs(self, batch: Batch) -> Tensor:
        given = batch.get("ref_logprobs")
        if given is None:
            given = self._need("reference", self.prepared.ref_logprobs).get(batch)
        return losses.sequence_sums(given, target_mask(batch))

    def _need(self, stage: str, value: _Found | None) -> _Found:
        if value is None:
            raise NotPreparedError(
                f"recipe {self.recipe.name!r} needs prepare(forget_batches, retain_batches) first: "
                f"its stage {stage!r} has not run"
            )
        return value


def _padded_share(batches: Sequence[Batch]) -> float:
    """Return the share of positions of the stacked batches that is padding added by stacking; 0 if they are packed."""
    if all("packing" in batch for batch in batches):
        return 0.0
    shapes = [batch["input_ids"].shape for batch in batches]
    stacked = sum(rows for rows, _ in shapes) * max(length for _, length in shapes)
    return 1 - sum(rows * length for rows, length in shapes) / stacked
