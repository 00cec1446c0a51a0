"""Puts what ranks hold of a step together on the first of them, which compares it with the step of one process.

    batches     of all ranks, in their order: the micro-batches that the one process meets
    routes      of their tokens, in the same order
    weights     gradients and optimizer state by whole parameters, one at a time, in memory on the first rank alone
    replicas    what several ranks hold must have the same bits on all of them

Every rank makes the same calls. What a single process has is whole already and comes back as it is.

Deterministic. Source: our specification.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe_unlearn.model.digest import tensor_digest
from moe_unlearn.optim import MaskedAdamW, MaskedSGD
from moe_unlearn.ranks import Ranks, gather, gathered
from moe_unlearn.sharding import held_rows, is_sharded, like, narrows, part, whole
from moe_unlearn.verify.judge import Run
from moe_unlearn.view import StepView


def of_all_ranks(own: Mapping[str, Tensor], ranks: Ranks) -> list[dict[str, Tensor]]:
    """Return each rank's tensors by name, in the order of the ranks, on the device of this rank's."""
    if ranks.group is None:
        return [dict(own)]
    found = []
    kinds = gather({name: [_dtype(t), list(t.shape)] for name, t in own.items()}, ranks.group)
    device = next(iter(own.values())).device if own else torch.device("cpu")
    for rank, described in enumerate(kinds):
        tensors = {
            name: own[name].contiguous()
            if rank == ranks.rank
            else torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            for name, (dtype, shape) in described.items()
        }
        # as bytes, since a backend may not know every dtype
        ranks.share_((t.view(-1).view(torch.uint8) for t in tensors.values() if t.numel()), rank)
        found.append(tensors)
    return found


def whole_run(run: Run, view: StepView, ranks: Ranks) -> Run:
    """Return a run by whole parameters, on the first rank; on the others it is empty where weights are shared out."""
    if not ranks.sharded:
        return run
    made = Run(run.losses, {}, set(), set(), {}, {})
    described, said = gathered(lambda: _described(run, view), lambda found: found, ranks.group)
    for name, p in view.model.named_parameters():
        of_ranks = [each[name] for each in said]
        shared = _Shared(p, keep=ranks.first)
        if name in run.weights:
            made.weights[name] = shared.rows(run.weights[name])
        dtypes = {each["gradient"] for each in of_ranks} - {None}
        if any(each["compact"] for each in of_ranks):
            made.compact.add(name)
        if any(each["updated"] for each in of_ranks):
            made.updated.add(name)
        if dtypes:
            ids = _trained_slices(p, view.optimizer) if name in made.compact else None
            made.gradients[name] = shared.together(run.gradients.get(name), ids, dtypes.pop())[0]
        elif name in run.gradients:
            made.gradients[name] = None
        own = run.state.get(name, {})
        slices = own.get("slices") if own else _trained_slices(p, view.optimizer)
        made.state[name] = _whole_state(own, slices, of_ranks, shared)
    return made if ranks.first else Run(run.losses, {}, set(), set(), {}, {})


def _described(run: Run, view: StepView) -> dict[str, dict[str, Any]]:
    """Return what this rank has of each parameter; ValueError where that is not what its rows have."""
    found = {}
    for name, p in view.model.named_parameters():
        gradient, state = run.gradients.get(name), run.state.get(name, {})
        compact = name in run.compact
        ids = _trained_slices(p, view.optimizer) if compact else None
        rows = part(p.detach())
        expected = rows.shape if ids is None else rows[ids].shape
        if gradient is not None and gradient.shape != expected:
            raise ValueError(f"gradient of {name}: expected shape {list(expected)}; got {list(gradient.shape)}")
        found[name] = {
            "gradient": None if gradient is None else _dtype(gradient),
            "compact": compact,
            "updated": name in run.updated,
            "step": float(state["step"]) if "step" in state else None,
            "state": {key: _dtype(value) for key, value in sorted(state.items()) if key not in ("step", "slices")},
        }
    return found


def _whole_state(
    own: Mapping[str, Tensor], slices: Tensor | None, of_ranks: list[dict[str, Any]], shared: "_Shared"
) -> dict[str, Tensor]:
    """Return the state of a whole parameter from that of the `slices` of each rank; empty if none has any."""
    state: dict[str, Tensor] = {}
    kinds = {key: dtype for each in of_ranks for key, dtype in each["state"].items()}
    for key, dtype in sorted(kinds.items()):
        state[key], ids = shared.together(own.get(key), slices, dtype)
        if len(ids) < shared.count:
            state["slices"] = ids
    if steps := [each["step"] for each in of_ranks if each["step"] is not None]:
        # a rank that counts otherwise must not be overlooked
        state["step"] = torch.tensor(steps[0] if len(set(steps)) == 1 else math.nan)
    return state


class _Shared:
    """Makes whole tensors of what ranks hold of one parameter; without `keep` this rank only takes part."""

    def __init__(self, p: Tensor, *, keep: bool):
        self.p, self.keep = p, keep
        self.count = len(p) if p.dim() else 1

    def rows(self, tensor: Tensor) -> Tensor:
        """Return a tensor that is shared out as the parameter is, as a whole."""
        made = whole(tensor)
        return made if self.keep else made.new_empty(0)

    def together(self, own: Tensor | None, ids: Tensor | None, dtype: str) -> tuple[Tensor, Tensor]:
        """Return the rows that `ids` of all ranks name, [M, ...], and which they are, int64 [M].

        `own` [len(ids), ...] are those of this rank, zeros where it has None. Its `ids` are counted from the first row
        that it holds, None for all of these.
        """
        held = part(self.p.detach())
        if not is_sharded(self.p):
            everywhere = torch.arange(self.count, device=held.device) if ids is None else ids
            return held.new_empty(0) if own is None else own, everywhere
        rows = torch.zeros(held.shape, dtype=getattr(torch, dtype), device=held.device)
        known = torch.zeros(len(held), dtype=torch.uint8, device=held.device)
        where = slice(None) if ids is None else ids
        known[where] = 1
        if own is not None:
            rows[where] = own
        known = whole(like(self.p, known))
        found = known.bool().nonzero().squeeze(1)
        made = self.rows(like(self.p, rows))
        return made[found] if self.keep and len(found) < self.count else made, found


def differing(run: Run, view: StepView, ranks: Ranks) -> list[str]:
    """Return what does not have the same bits on all ranks that hold it; nothing does so in a single process."""
    if ranks.group is None:
        return []
    problems: list[str] = []
    first: dict[tuple[str, int, int], tuple[str, int]] = {}
    for rank, said in enumerate(gather(_digests(run, view), ranks.group)):
        for what, start, stop, digest in said:
            known, other = first.setdefault((what, start, stop), (digest, rank))
            if known != digest:
                problems.append(f"{what}: rank {rank} has other bits than rank {other}")
    return problems


def _digests(run: Run, view: StepView) -> list[tuple[str, int, int, str]]:
    """Return a digest of each weight and each state that this rank has after a step, by the rows of the parameter."""
    made = []
    for name, p in view.trained:
        held = held_rows(p)
        parts = {f"weight {name}": part(run.weights[name])}
        parts |= {f"{key} of {name}": value for key, value in run.state[name].items()}
        made += [(what, held.start, held.stop, tensor_digest(tensor)) for what, tensor in parts.items()]
    return made


def check_precision(model: nn.Module) -> None:
    """Raise ValueError where FSDP2 computes with fewer bits than the weights have, which no plain step does."""
    if narrows(model):
        raise ValueError(
            "verify is for ranks that compute in the dtype of the weights; FSDP2 was given a mixed precision "
            "(MixedPrecisionPolicy): leave it out, or verify=0"
        )


def _trained_slices(p: Tensor, optimizer: MaskedSGD | MaskedAdamW) -> Tensor | None:
    """Return which of its rows of a parameter this rank trains, None for all of them."""
    layout = optimizer.layout(p)
    return None if layout is None else layout.trained_slices


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
