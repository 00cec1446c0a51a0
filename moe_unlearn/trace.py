"""TRACE: weighs retain tokens so that forget-critical experts are regularised.

The paper (arXiv 2606.10338; abstract and digests read, formulas and code not public) says that forget data
over-activates a few experts which retain data hits less. It finds them offline from activation frequencies, and
reweights token-level retain losses so that each selected expert's weighted retain frequency better matches its
forget frequency. Every formula here is our specification of that idea.

    f[l, e]    = (top-K hits of expert e in layer l) / (counted tokens)                sums to K in a layer
    a[t, s]    = top-K hits of the selected expert s by token t                        0 or 1, but for hash routers
    selected     f^F >= min_load K / E  and  f^F / f^R >= min_ratio, the `per_layer` largest gaps f^F - f^R
    target     = (1 - eta) f^R + eta f^F                                               where selected
    w_t        = min(cap, exp(b + sum_{s selected} theta_s a_{t,s}))                   `ops.retain_weights`
    L_retain   = sum_t w_t l_t / (number of retain positions)

A position t counts iff it carries a loss (`model.batches.target_mask`), and its weight multiplies the loss of
predicting labels[t + 1]. An expert that no retain token uses has an infinite ratio and may be selected. Its
target cannot be reached: its `achieved` stays 0 and no weight depends on it.
"""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_unlearn import ops
from moe_unlearn.model.batches import Batch, padded, target_mask
from moe_unlearn.model.capture import routing_capture
from moe_unlearn.model.head import final_hidden_states
from moe_unlearn.model.modes import evaluation_mode
from moe_unlearn.model.packing import call_of
from moe_unlearn.progress import watched
from moe_unlearn.ranks import Ranks, by_itself, turns

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoutingFrequencies:
    """Top-K hits per layer and expert over the counted tokens of a set."""

    counts: Tensor  # [L, E] int64, CPU
    tokens: int
    layers: list[str]  # names of the experts modules

    @property
    def frequency(self) -> Tensor:
        """Return f [L, E] float64, in [0, 1] unless a token has an id twice; the f of a layer sum to K."""
        return self.counts.double() / max(self.tokens, 1)

    def to_dict(self) -> dict:
        """Return the frequencies as a dict of one tensor and plain values."""
        return {"counts": self.counts, "tokens": self.tokens, "layers": self.layers}

    @classmethod
    def from_dict(cls, state: dict) -> "RoutingFrequencies":
        """Undo `to_dict`; `counts` may also be nested lists, as JSON has them."""
        counts = torch.as_tensor(state["counts"], dtype=torch.int64)
        return cls(counts, int(state["tokens"]), list(state["layers"]))


@dataclass(frozen=True)
class RetainWeights:
    """Calibrated token weights, and the rule that gives the weight of any routing."""

    weights: Tensor  # [T] float32, mean 1
    ess: float  # effective sample size (sum w)^2 / sum w^2, in tokens
    achieved: Tensor  # [L, E] float64, weighted retain frequency where selected, 0 elsewhere
    tilt: Tensor  # [L, E] float64, theta where selected, 0 elsewhere
    bias: float  # b

    @property
    def log_weight_max(self) -> float:
        """Return the log of the largest weight, the cap of online weights if the calibration had none."""
        return math.log(float(self.weights.max()))


def routing_frequencies(model: nn.Module, batches: Iterable[Batch], ranks: Ranks | None = None) -> RoutingFrequencies:
    """Count the routing of every position that carries a loss, in evaluation mode without gradients.

    `ranks` share the batches, which are the same on all of them. The model is left as it was. Raises ValueError if it
    has no MoE layers or no position counts.
    """

    def count() -> int:
        tokens = 0
        for batch, counts in turns(map(padded, watched(batches, "routing")), ranks):
            mask = target_mask(batch) & counts
            tokens += int(mask.sum())
            call = call_of(batch)
            capture.group = call.tokens(torch.where(mask, 0, -1).int(), -1)
            final_hidden_states(model, batch, call)
        return tokens

    with torch.no_grad(), evaluation_mode(model), routing_capture(model) as capture:
        tokens = by_itself(count, ranks)
        if ranks is not None:
            tokens = int(ranks.sums([tokens])[0])
        if not tokens:
            raise ValueError("no position carries a loss: the set is empty or all its labels are -100")
        hits = capture.counts.cpu()
    return RoutingFrequencies(hits if ranks is None else ranks.total_(hits), tokens, capture.layers)


def select_experts(
    forget: RoutingFrequencies | Tensor,
    retain: RoutingFrequencies | Tensor,
    *,
    per_layer: int,
    min_ratio: float = 1.5,
    min_load: float = 1.0,
    allow_empty: bool = False,
) -> Tensor:
    """Select the forget-critical experts, bool [L, E]; see the module docstring. Equal gaps go to the lower id.

    Args:
        forget, retain: frequencies, or tables [L, E] of them.
        per_layer: at most this many in each layer.
        min_ratio: smallest f^F / f^R; the ratio is infinite where no retain token uses the expert.
        min_load: smallest f^F in units of the uniform load K / E.

    If no expert qualifies, raises ValueError naming the highest ratio found and the remedies; with `allow_empty` a
    warning names the ratio instead.
    """
    if per_layer < 1:
        raise ValueError(f"per_layer must be at least 1; got {per_layer}")
    f, r = _frequency(forget), _frequency(retain)
    if f.shape != r.shape or f.dim() != 2:
        raise ValueError(f"expected two tables [L, E] of one shape; got {list(f.shape)} and {list(r.shape)}")
    ratio = _ratios(f, r, min_load)
    critical = ratio >= min_ratio
    if not critical.any():
        message = why_empty(f, r, min_ratio=min_ratio, min_load=min_load)
        if not allow_empty:
            raise ValueError(
                f"{message}. Remedies: a lower min_ratio or min_load, or allow_empty, with which every "
                "retain token counts the same"
            )
        _log.warning("TRACE inactive: %s; every retain token counts the same", message)
    gap = torch.where(critical, f - r, -torch.inf)
    largest = torch.argsort(gap, dim=1, descending=True, stable=True)[:, :per_layer]
    return torch.zeros_like(critical).scatter_(1, largest, True) & critical


def why_empty(
    forget: RoutingFrequencies | Tensor, retain: RoutingFrequencies | Tensor, *, min_ratio: float, min_load: float
) -> str:
    """Describe why no expert of two tables is forget-critical, naming the one that came nearest."""
    ratio = _ratios(_frequency(forget), _frequency(retain), min_load)
    if not ratio.isfinite().any():
        return f"no forget-critical expert: none has {min_load} times the uniform load on the forget set"
    layer, expert = divmod(int(ratio.argmax()), ratio.shape[1])
    return (
        "no forget-critical expert: the highest ratio of forget to retain frequency is "
        f"{float(ratio.max()):.3f} (layer {layer}, expert {expert}), min_ratio is {min_ratio}"
    )


def calibration_target(forget: RoutingFrequencies | Tensor, retain: RoutingFrequencies | Tensor, eta: float) -> Tensor:
    """Compute the target (1 - eta) f^R + eta f^F, [L, E] float64; eta in [0, 1] moves retain towards forget."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1]; got {eta}")
    return (1 - eta) * _frequency(retain) + eta * _frequency(forget)


def retain_weights(
    top_k_index: Tensor, selected: Tensor, target: Tensor, *, cap: float | None = None, impl: str = "auto"
) -> RetainWeights:
    """Calibrate token weights from the routing of all counted retain tokens; see the module docstring.

    Args:
        top_k_index: int [L, T, K], T >= 1; an id twice in one row counts twice, as in the frequencies and on-line.
        selected: bool [L, E]; without a selected expert all weights are 1.
        target: float [L, E], frequencies like those of `routing_frequencies`, read where selected; an unreachable
            target is replaced by the nearest reachable one, see `.achieved`.
        cap: largest weight, >= 1; None for no cap.

    Raises TypeError or ValueError if dtypes, shapes or values do not fit.
    """
    _check(top_k_index, selected, target)
    return weights_of_hits(selected_hits(top_k_index, selected), selected, target, cap=cap, impl=impl)


def selected_hits(top_k_index: Tensor, selected: Tensor) -> Tensor:
    """Count how often each token visits each expert that is `selected`, bool [L, E]: uint8 [T, S], in their order."""
    index = selected.nonzero().tolist()
    hits = torch.zeros(top_k_index.shape[1], len(index), dtype=torch.uint8, device=top_k_index.device)
    for i, (layer, expert) in enumerate(index):
        hits[:, i] = (top_k_index[layer] == expert).sum(-1, dtype=torch.uint8)
    return hits


def weights_of_hits(
    hits: Tensor, selected: Tensor, target: Tensor, *, cap: float | None = None, impl: str = "auto"
) -> RetainWeights:
    """Calibrate token weights as `retain_weights` does, from the `selected_hits` of all counted retain tokens."""
    chosen = selected.cpu()
    solved = ops.retain_weights(hits, target.double().cpu()[chosen], cap=cap, impl=impl)
    achieved, tilt = (
        torch.zeros(chosen.shape, dtype=torch.float64).masked_scatter(chosen, values)
        for values in (solved.achieved, solved.tilt)
    )
    return RetainWeights(solved.weights, solved.ess, achieved, tilt, solved.bias)


def online_weights(log_weight: Tensor, bias: float, cap: float | None) -> Tensor:
    """Compute min(cap, exp(bias + log_weight)), float32, for the tilt that `ops.route` added up in a forward pass.

    theta and b stay those of the preparation, so that the mean is 1 only as far as the routing has not moved.
    A recipe without a cap passes the largest weight seen in the preparation (exp `.log_weight_max`), so that the
    weight of a token whose routing did not occur there cannot explode.
    """
    weights = (log_weight.double() + bias).exp()
    return (weights if cap is None else weights.clamp_max(cap)).float()


def _frequency(table: RoutingFrequencies | Tensor) -> Tensor:
    return table.frequency if isinstance(table, RoutingFrequencies) else table.double()


def _ratios(forget: Tensor, retain: Tensor, min_load: float) -> Tensor:
    """Compute f^F / f^R [L, E]: inf where no retain token uses the expert, -inf where the forget load is too small."""
    # the frequencies of a layer sum to K, so their mean is the uniform load K / E
    loaded = (forget > 0) & (forget >= min_load * forget.mean(1, keepdim=True))
    return torch.where(loaded, torch.where(retain > 0, forget / retain, torch.inf), -torch.inf)


def _check(top_k_index: Tensor, selected: Tensor, target: Tensor) -> None:
    if top_k_index.is_floating_point() or top_k_index.dtype == torch.bool:
        raise TypeError(f"top_k_index must be an integer tensor; got {top_k_index.dtype}")
    if top_k_index.dim() != 3 or top_k_index.shape[1] == 0:
        raise ValueError(f"top_k_index must be [L, T, K] with T >= 1; got {list(top_k_index.shape)}")
    if selected.dtype != torch.bool or selected.dim() != 2 or len(selected) != len(top_k_index):
        raise ValueError(
            f"selected must be bool [L, E] with L = {len(top_k_index)}; got {selected.dtype} {list(selected.shape)}"
        )
    if target.shape != selected.shape:
        raise ValueError(f"target must be [L, E] = {list(selected.shape)}; got {list(target.shape)}")
