"""The recipe's losses of one pair of batches, each a scalar with its graph.

Names: `forget` (GA, NPO, SimNPO, IDK-DPO, RMU or UCE), `retain` (NLL, KL or RMU's embedding difference),
`kl` (MOLLM's third objective) and `anchor` (SEUF). Formulas are in `losses` and `seuf`; here they meet
batches, caches and TRACE's token weights:

    L_retain = sum_t w_t l_t / (number of retain positions)

Each loss is a mean over its own unit: positions that carry a loss, or sequences for NPO, SimNPO and DPO.
`sizes` counts these units, so that a caller that splits a batch can weigh the parts exactly.
"""

import contextlib

import torch
from torch import Tensor, nn

from moe_unlearn import losses, seuf, trace
from moe_unlearn.config import Recipe
from moe_unlearn.experts import experts_modules, step_inputs
from moe_unlearn.forward import Batch, control_vector, layer_states, refusal, sequence_logprobs
from moe_unlearn.preparation import Preparation


class NotPreparedError(RuntimeError):
    """The recipe needs something that prepare() computes and has not computed."""


class Objectives:
    """Evaluates a recipe's objectives on batches of the model it was made for."""

    def __init__(self, model: nn.Module, recipe: Recipe, prepared: Preparation):
        self.model, self.recipe, self.prepared = model, recipe, prepared

    def sizes(self, forget: Batch, retain: Batch) -> dict[str, int]:
        """Units each side's losses average over: sequences for sequence losses, else positions."""
        by_sequence = self.recipe.forget.objective in ("npo", "simnpo", "idk_dpo")
        positions = int(losses.target_mask(forget).sum())
        return {
            "forget": len(forget["input_ids"]) if by_sequence else positions,
            "retain": int(losses.target_mask(retain).sum()),
        }

    def forget(self, batch: Batch) -> dict[str, Tensor]:
        """{"forget": loss} and, for SEUF, {"anchor": loss}."""
        if self.recipe.scope.kind != "seuf":
            return {"forget": self._forget(batch)}
        layer, expert = self._need("seuf", self.prepared.selected).nonzero()[0].tolist()
        name = list(experts_modules(self.model))[layer]
        with seuf.gates(self.model, [name]) as collected:
            loss = self._forget(batch)
        # several forward passes (DPO) keep the first gate, that of the batch itself
        attended = batch["attention_mask"].bool().flatten()
        return {"forget": loss, "anchor": seuf.anchor_loss(collected[name], expert, attended)}

    def retain(self, batch: Batch) -> dict[str, Tensor]:
        """{"retain": loss} and, for MOLLM, {"kl": loss}; both from one forward pass."""
        objective = self.recipe.retain.objective
        if objective == "embed_diff":
            reference = self._need("reference", self.prepared.ref_layer_states).get(batch)
            states = layer_states(self.model, batch, self.recipe.forget.layer)
            mask = losses.target_mask(batch)
            return {"retain": losses.embed_diff(states, reference.to(states.dtype), mask)}
        with self._tilted(batch) as weigh:
            states = losses.final_hidden_states(self.model, batch)
        weights = weigh()
        positions = losses.target_mask(batch).sum().clamp_min(1)
        out = {}
        if objective != "none":
            out["retain"] = self._token_sum(batch, states, objective, weights) / positions
        if self.recipe.mollm is not None and self.recipe.mollm.kl:
            out["kl"] = self._token_sum(batch, states, "kl", None) / positions
        return out

    def _token_sum(self, batch: Batch, states: Tensor, kind: str, weights: Tensor | None) -> Tensor:
        keywords = {}
        if kind == "kl":
            reference = batch.get("ref_hidden_states")
            if reference is None:
                reference = self._need("reference", self.prepared.ref_hidden_states).get(batch)
            keywords = {
                "ref_hidden_states": reference.to(states.dtype),
                "ref_lm_head": self.prepared.ref_lm_head,
            }
        per_token = losses.token_losses(
            self.model, batch, kind=kind, token_weights=weights, hidden_states=states, **keywords
        )
        return per_token.sum()

    @contextlib.contextmanager
    def _tilted(self, batch: Batch):
        """Yields a function that gives the token weights once the forward pass inside is over."""
        settings = self.recipe.trace
        given = batch.get("token_weights")
        if given is not None or settings is None or self.prepared.inactive:
            yield lambda: given
        elif settings.refresh == "offline":
            yield lambda: self._need("trace", self.prepared.token_weights).get(batch)
        else:
            state = self._need("trace", self.prepared.calibration)
            log_weight = torch.zeros(batch["input_ids"].numel(), device=batch["input_ids"].device)
            with step_inputs(self.model, log_tilt=state.tilt.float(), log_weight=log_weight):
                yield lambda: trace.online_weights(log_weight, state.bias, settings.cap or state.largest_weight).view(
                    batch["input_ids"].shape
                )

    def _forget(self, batch: Batch) -> Tensor:
        settings = self.recipe.forget
        if settings.objective == "rmu":
            states = layer_states(self.model, batch, settings.layer)
            control = control_vector(self.recipe.seed, settings.steering, states.shape[-1]).to(states)
            return losses.rmu(states, control, losses.target_mask(batch))
        if settings.objective in ("ga", "uce"):
            kind = "nll" if settings.objective == "ga" else "uce"
            per_token = losses.token_losses(self.model, batch, kind=kind)
            mean = per_token.sum() / losses.target_mask(batch).sum().clamp_min(1)
            return -mean if settings.objective == "ga" else mean
        sequences = sequence_logprobs(self.model, batch)
        if settings.objective == "simnpo":
            lengths = losses.target_mask(batch).sum(1)
            return losses.simnpo(sequences, lengths, settings.beta, settings.delta)
        reference = self._reference_logprobs(batch)
        if settings.objective == "npo":
            return losses.npo(sequences, reference, settings.beta)
        idk = refusal(batch)
        return losses.idk_dpo(
            sequence_logprobs(self.model, idk),
            self._need("reference", self.prepared.ref_logprobs_idk).get(idk).sum(1),
            sequences,
            reference,
            settings.beta,
        )

    def _reference_logprobs(self, batch: Batch) -> Tensor:
        given = batch.get("ref_logprobs")
        if given is None:
            given = self._need("reference", self.prepared.ref_logprobs).get(batch)
        return losses.sequence_sums(given, losses.target_mask(batch))

    def _need(self, stage: str, value):
        if value is None:
            raise NotPreparedError(
                f"recipe {self.recipe.name!r} needs prepare(forget_batches, retain_batches) first: "
                f"its stage {stage!r} has not run"
            )
        return value
