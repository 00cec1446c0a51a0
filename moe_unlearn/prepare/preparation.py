"""Holds what `prepare` found on the unchanged model: its state, which a checkpoint has too."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from moe_unlearn.masks import WeightMask
from moe_unlearn.model.head import ReferenceHead
from moe_unlearn.prepare.rows import RowCache
from moe_unlearn.routers import Kept
from moe_unlearn.sharding import is_sharded
from moe_unlearn.trace import RoutingFrequencies

CACHES = {
    "token_weights": "TRACE token weights",
    "ref_logprobs": "reference log-probs",
    "ref_logprobs_idk": "reference log-probs of the refusals",
    "ref_hidden_states": "reference hidden states",
    "ref_hidden_states_forget": "reference hidden states of the forget rows",
    "ref_layer_states": "reference layer outputs",
}
CACHED_SIDES = dict.fromkeys(CACHES, "retain") | {
    "ref_logprobs": "forget",
    "ref_logprobs_idk": "refusals",
    "ref_hidden_states_forget": "forget",
}


@dataclass
class Calibration:
    """TRACE's rule for token weights, w_t = min(cap, exp(bias + sum_k tilt[expert_k])), and how well it does."""

    tilt: Tensor  # [L, E]
    bias: float
    achieved: Tensor  # [L, E], weighted retain frequency
    ess: float  # effective sample size, in tokens
    largest_weight: float


@dataclass
class Preparation:
    """Results of the stages; None where a stage has not run or the recipe does not need it."""

    done: list[str] = dataclasses.field(default_factory=list)
    rows: dict[str, list[str]] | None = None  # content keys of all rows of "forget", "refusals" and "retain"
    frequencies: dict[str, RoutingFrequencies] | None = None
    selected: Tensor | None = None  # bool [L, E]
    calibration: Calibration | None = None
    token_weights: RowCache | None = None
    ref_logprobs: RowCache | None = None
    ref_logprobs_idk: RowCache | None = None
    ref_hidden_states: RowCache | None = None
    ref_hidden_states_forget: RowCache | None = None
    ref_layer_states: RowCache | None = None
    ref_lm_head: Tensor | None = None
    ref_bias: Tensor | None = None  # of the reference's head, like its weight only where the model's own may differ
    kl_floor: float | None = None
    mask: WeightMask | None = None
    routers: dict[str, Kept] | None = None  # what invariant routers keep, by the name of the weight
    routes: Tensor | None = None  # int16 [L, T, K], the experts of the retain tokens that are watched
    router_logits: dict[str, Tensor] | None = None  # [T, E] of the same tokens, by the name of the weight
    inactive: bool = False  # TRACE found no expert and the recipe allows that

    @property
    def ref_head(self) -> ReferenceHead:
        """Return what is kept of the reference's head, as `token_losses` takes it."""
        return {"ref_lm_head": self.ref_lm_head, "ref_bias": self.ref_bias}

    def caches(self) -> dict[str, RowCache]:
        """Return the caches that there are."""
        return {name: cache for name in CACHES if (cache := getattr(self, name)) is not None}

    def find(self, cache_dir: Path | None) -> int:
        """Find the rows on disk of a state that was loaded, as `RowCache.find` does; return how many rows there are."""
        return sum(cache.find(cache_dir) for cache in self.caches().values())

    def chosen(self) -> list[Tensor]:
        """Return what decides how weights train and every rank has whole: selected experts, the mask, kept routers."""
        found = [self.selected, *(self.mask.packed.values() if self.mask is not None else [])]
        found += [tensor for kept in (self.routers or {}).values() for tensor in kept.tensors]
        return [tensor for tensor in found if tensor is not None and not is_sharded(tensor)]

    def state_dict(self) -> dict:
        """Return the results as a nested dict of tensors and plain values, whole; all ranks have to call this."""
        state: dict = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, RowCache | WeightMask):
                value = value.state_dict()
            elif isinstance(value, Calibration):
                value = dataclasses.asdict(value)
            elif field.name == "frequencies" and value is not None:
                value = {side: frequencies.to_dict() for side, frequencies in value.items()}
            elif field.name == "routers" and value is not None:
                value = {name: kept.state_dict() for name, kept in value.items()}
            state[field.name] = value
        return state

    def load_state_dict(self, state: dict) -> None:
        """Restore the results from a `state_dict`; raise ValueError, and change nothing, if it has other entries."""
        names = {field.name for field in dataclasses.fields(self)}
        if different := sorted(names ^ state.keys()):
            which = "lacks" if different[0] in names else "also has"
            raise ValueError(
                f"the state of the preparation {which} {different[0]!r}: another version of moe_unlearn saved it; "
                "resume with that version, or prepare again from the original model"
            )
        for field in dataclasses.fields(self):
            value = state[field.name]
            if value is not None and field.name in CACHES:
                cache = RowCache(CACHES[field.name])
                cache.load_state_dict(value)
                value = cache
            elif value is not None and field.name == "mask":
                value = WeightMask.from_state_dict(value)
            elif value is not None and field.name == "calibration":
                value = Calibration(**value)
            elif value is not None and field.name == "frequencies":
                value = {side: RoutingFrequencies.from_dict(v) for side, v in value.items()}
            elif value is not None and field.name == "routers":
                value = {name: Kept(**kept) for name, kept in value.items()}
            setattr(self, field.name, value)
