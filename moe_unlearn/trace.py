"""TRACE: which retain tokens must count more, so that forget-critical experts are regularised.

The paper (arXiv 2606.10338) says: forget data over-activates a few experts, retain data hits them less;
find them offline from activation frequencies and reweight token-level retain losses so that each selected
expert's weighted retain frequency better matches its forget frequency. Its formulas are not public; all
formulas here are our specification of that idea.

    f[l, e]      = (top-K hits of expert e in layer l) / (counted tokens)        sums to K in a layer
    selected     : f^F >= min_load K / E and f^F / f^R >= min_ratio, top `per_layer` by the gap f^F - f^R
    target       = (1 - eta) f^R + eta f^F                                       on the selected experts
    w_t          = min(cap, exp(b + sum_{s selected} theta_s a_{t,s}))           `ops.retain_weights`
    L_retain     = sum_t w_t l_t / (number of retain positions)

A position counts iff it carries a loss (`losses.target_mask`). An expert no retain token uses has an
unreachable target: it stays selected and its weighted frequency stays 0.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_unlearn import ops
from moe_unlearn.capture import count_experts
from moe_unlearn.experts import experts_modules
from moe_unlearn.losses import target_mask

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class RoutingFrequencies:
    """Top-K hits per layer and expert over the counted tokens of a set."""

    counts: Tensor  # [L, E] int64
    tokens: int
    layers: list[str]

    @property
    def frequency(self) -> Tensor:
        """f [L, E] float64 in [0, 1]; a layer sums to K."""
        return self.counts.double() / max(self.tokens, 1)

    def to_dict(self) -> dict:
        """Plain values and one tensor."""
        return {"counts": self.counts, "tokens": self.tokens, "layers": self.layers}

    @classmethod
    def from_dict(cls, state: dict) -> "RoutingFrequencies":
        """Undo `to_dict`."""
        return cls(torch.as_tensor(state["counts"]), int(state["tokens"]), list(state["layers"]))


@dataclass(frozen=True)
class RetainWeights:
    """Calibrated token weights and the rule behind them."""

    weights: Tensor  # [T] float32, mean 1
    ess: float  # effective sample size (sum w)^2 / sum w^2, in tokens
    achieved: Tensor  # [L, E] float64: weighted retain frequency of the selected experts, 0 elsewhere
    tilt: Tensor  # [L, E] float64: theta, 0 elsewhere
    bias: float


def routing_frequencies(model: nn.Module, batches: Iterable[Batch]) -> RoutingFrequencies:
    """Count the routing of all positions that carry a loss; the model is left as it was.

    Raises ValueError if the model has no MoE layers or no position counts.
    """
    counts, tokens = None, 0
    for batch in batches:
        mask = target_mask(batch)
        hits = count_experts(model, batch, mask).cpu()
        counts = hits if counts is None else counts + hits
        tokens += int(mask.sum())
    if not tokens:
        raise ValueError("no position carries a loss: the set is empty or all its labels are -100")
    return RoutingFrequencies(counts, tokens, list(experts_modules(model)))


def select_experts(
    forget: RoutingFrequencies | Tensor,
    retain: RoutingFrequencies | Tensor,
    *,
    per_layer: int,
    min_ratio: float = 1.5,
    min_load: float = 1.0,
    allow_empty: bool = False,
) -> Tensor:
    """Forget-critical experts, bool [L, E]; see the module docstring. Equal gaps go to the lower id.

    Raises ValueError when none qualifies, naming the highest ratio found, unless `allow_empty`.
    """
    if per_layer < 1:
        raise ValueError(f"per_layer must be at least 1; got {per_layer}")
    f, r = _frequency(forget), _frequency(retain)
    if f.shape != r.shape or f.dim() != 2:
        raise ValueError(f"expected two tables [L, E] of one shape; got {list(f.shape)} and {list(r.shape)}")
    top_k = f.sum(1, keepdim=True)
    loaded = (f > 0) & (f >= min_load * top_k / f.shape[1])
    ratio = torch.where(r > 0, f / r.clamp_min(1e-300), torch.inf)
    candidates = loaded & (ratio >= min_ratio)
    if not candidates.any() and not allow_empty:
        highest = torch.where(loaded, ratio, 0.0).max()
        raise ValueError(
            f"no forget-critical expert: the highest ratio of forget to retain frequency is {float(highest):.3f}, "
            f"min_ratio is {min_ratio}; lower it, or allow an empty selection"
        )
    gap = torch.where(candidates, f - r, -torch.inf)
    ranked = torch.argsort(gap, dim=1, descending=True, stable=True)[:, :per_layer]
    selected = torch.zeros_like(candidates).scatter_(1, ranked, True)
    return selected & candidates


def calibration_target(
    forget: RoutingFrequencies | Tensor, retain: RoutingFrequencies | Tensor, eta: float
) -> Tensor:
    """(1 - eta) f^R + eta f^F, [L, E] float64; eta in [0, 1]."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1]; got {eta}")
    return (1 - eta) * _frequency(retain) + eta * _frequency(forget)


def retain_weights(
    top_k_index: Tensor, selected: Tensor, target: Tensor, *, cap: float | None = None, impl: str = "auto"
) -> RetainWeights:
    """Token weights from the routing of all retain tokens; see the module docstring.

    Args:
        top_k_index: int [L, T, K]; an id twice in one row counts once.
        selected: bool [L, E]; target: float [L, E], read where selected.
        cap: largest weight, None is no cap.

    Nothing selected gives weights 1. Raises ValueError if the shapes do not fit or T = 0.
    """
    if top_k_index.dim() != 3 or top_k_index.shape[1] == 0:
        raise ValueError(f"top_k_index must be [L, T, K] with T >= 1; got {list(top_k_index.shape)}")
    if selected.dtype != torch.bool or selected.dim() != 2 or len(selected) != len(top_k_index):
        raise ValueError(
            f"selected must be bool [L, E] with L = {len(top_k_index)}; got {selected.dtype} {list(selected.shape)}"
        )
    if target.shape != selected.shape:
        raise ValueError(f"target must be {list(selected.shape)}; got {list(target.shape)}")
    chosen = selected.nonzero()
    members = torch.stack(
        [(top_k_index[layer] == expert).any(-1) for layer, expert in chosen.tolist()]
        or [top_k_index.new_zeros(top_k_index.shape[1], dtype=torch.bool)],
        dim=1,
    )
    wanted = target.double().cpu()[selected.cpu()] if len(chosen) else torch.zeros(1, dtype=torch.float64)
    solved = ops.retain_weights(members, wanted, cap=cap, impl=impl)
    tilt, achieved = (torch.zeros(selected.shape, dtype=torch.float64) for _ in range(2))
    if len(chosen):
        tilt[selected.cpu()], achieved[selected.cpu()] = solved.tilt, solved.achieved
    return RetainWeights(solved.weights, solved.ess, achieved, tilt, solved.bias)


def online_weights(log_weight: Tensor, bias: float, cap: float) -> Tensor:
    """min(cap, exp(bias + log_weight)) of the tilt `ops.route` added up during the forward pass.

    theta and b are those of the preparation, so the mean is 1 only as far as the routing has not moved.
    """
    return (log_weight.double() + bias).exp().clamp_max(cap).float()


def _frequency(table: RoutingFrequencies | Tensor) -> Tensor:
    return table.frequency if isinstance(table, RoutingFrequencies) else table.double()
