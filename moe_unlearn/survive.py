"""Moves weights within reach of a grid's cells, so that rounding a model keeps what unlearning has changed.

Round-to-nearest treats every weight alone: an update smaller than half a step of the grid is undone, and the errors of
a row add up in its output. The codes are therefore chosen together, on the inputs that forget and retain text give to
each weight W [outputs, inputs] of the unlearned model (our specification; the order of choice is GPTQ's, arXiv
2210.17323, with the scales fixed):

    H   = (H_forget / n_forget + H_retain / n_retain) / 2 + 0.01 mean(diag H) 1       H_side = sum_t x_t x_t^T
    U   = the upper Cholesky factor of H^-1
    for each input i, from the first:   c_i = the code nearest to w_i
                                        w_j -= (w_i - value(c_i)) U_ij / U_ii         for all j > i
    c   = the codes of round-to-nearest in each row in which (q - w) H (q - w)^T is not smaller with those chosen

A weight whose code is that of round-to-nearest stays as it is, to the bit. Another moves to the nearest place in the
cell of its code that lies at least 0.6 of the way from the cell's bound to its level, so that rounding the saved model
to nearest gives c and no tool has to know of this. The largest weight of a group, which makes its scale, stays, and so
does every weight outside of the scope and the mask. x_t of an expert's second projection is its activation times the
router's weight; t counts the attended tokens of the rows, for an expert those that are routed to it.

The memory beside the model is H of the weights of one decoder layer, float32, and some copies of its largest weight;
the rows pass through the model once for each layer.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_unlearn.experts import experts_modules, layout_of
from moe_unlearn.model.batches import Batch, attended_mask, padded
from moe_unlearn.model.grids import GRIDS, Grid, linear_weights
from moe_unlearn.model.head import final_hidden_states
from moe_unlearn.model.modes import evaluation_mode
from moe_unlearn.model.packing import call_of
from moe_unlearn.ops.bits import unpack_bits
from moe_unlearn.ops.gate import activate
from moe_unlearn.ranks import sharded

DAMPING = 0.01
INSIDE = 0.4  # of a cell's half, how far from its level a moved weight may lie: bfloat16 rounds int8 codes by 0.25


class Moved(NamedTuple):
    """How many weights could move, and how many did."""

    weights: int
    moved: int


def grid_of(name: str) -> Grid:
    """Return the grid of a name; ValueError for another."""
    for grid in GRIDS:
        if grid.name == name:
            return grid
    raise ValueError(f"expected a grid {', '.join(grid.name for grid in GRIDS)}; got {name!r}")


def check_holdable(model: nn.Module) -> None:
    """Raise ValueError for a model whose weights cannot be moved: shared out over ranks, or behind adapters."""
    if sharded(model):
        raise ValueError("survive moves whole weights, which a mesh shares out: leave out --mesh, or survive")
    if hasattr(model, "peft_config"):
        raise ValueError("survive moves the weights of the model itself, not those of adapters: survive=null")


def memory(model: nn.Module) -> int:
    """Return the bytes that `hold` takes beside the model at most: moments twice, and work on the largest weight."""
    trained = {name: at for name, at in linear_weights(model).items() if at[0].requires_grad}
    # of each weight the moments of both sides, and of the one in work the inverse, its factors and eight copies
    moments = {name: math.prod(w.shape[:-2]) * w.shape[inputs] ** 2 for name, (w, inputs) in trained.items()}
    most = 0
    for names in _layers(trained):
        work = max(4 * moments[name] + 8 * trained[name][0].numel() for name in names)
        most = max(most, 2 * sum(moments[name] for name in names) + work)
    return 4 * most


def hold(
    model: nn.Module,
    grid: Grid | str,
    forget: Sequence[Batch],
    retain: Sequence[Batch],
    masks: Mapping[str, Tensor] | None = None,
) -> Moved:
    """Move the weights that train so that rounding to the grid keeps what the model does on both sides' rows.

    `masks` are the packed masks of parameters by name, of those that may not move everywhere. Weights that do not
    require a gradient stay. Raises ValueError as `check_holdable` does, and for experts that are not computed here.
    """
    check_holdable(model)
    grid = grid_of(grid) if isinstance(grid, str) else grid
    trained = {name: at for name, at in linear_weights(model).items() if at[0].requires_grad}
    count = moved = 0
    for names in _layers(trained):
        moments = [_moments(model, side, names) for side in (forget, retain)]
        for name in names:
            weight, inputs = trained[name]
            second = (moments[0][name] + moments[1][name]) / 2
            may = None if masks is None or name not in masks else unpack_bits(masks[name], weight.shape[-1])
            rows = weight.detach().movedim(inputs, -1)
            own = settled(rows, second, grid, None if may is None else may.movedim(inputs, -1))
            changed = own != rows
            count, moved = count + changed.numel(), moved + int(changed.sum())
            with torch.no_grad():
                rows.copy_(own)
    return Moved(count, moved)


def settled(weight: Tensor, second: Tensor, grid: Grid, may: Tensor | None = None) -> Tensor:
    """Return a weight [..., outputs, inputs], in its dtype, for the second moments [..., inputs, inputs] of its inputs.

    `may` [..., outputs, inputs] says which weights may move, None that all may. See the module docstring.
    """
    former = weight.float()
    size = former.shape[-1]
    codes, scales = grid.codes(weight, weight.dim() - 1)
    scale = scales.expand_as(codes).flatten(-2)[..., :size]
    nearest = codes.flatten(-2)[..., :size]
    stays = former.abs() >= scale * (grid.largest or 1) * (1 - 1e-6)
    if may is not None:
        stays = stays | ~may
    diagonal = second.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    damped = second + torch.where(diagonal > 0, DAMPING * diagonal, 1.0) * torch.eye(size, device=second.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    work, chosen = former.clone(), nearest.clone()
    for i in range(size):
        column = work[..., i]
        chosen[..., i] = torch.where(stays[..., i], nearest[..., i], grid.nearest(column / scale[..., i]))
        error = (column - grid.level(chosen[..., i]) * scale[..., i]) / upper[..., i, i, None]
        work[..., i + 1 :] -= error[..., None] * upper[..., i, None, i + 1 :]

    def costs(codes: Tensor) -> Tensor:
        error = grid.level(codes) * scale - former
        return ((error @ damped) * error).sum(-1, keepdim=True)

    chosen = torch.where(costs(chosen) < costs(nearest), chosen, nearest)
    level, (low, high) = grid.level(chosen), grid.cell(chosen)
    low, high = ((level + INSIDE * (bound - level)) * scale for bound in (low, high))
    return torch.where(chosen == nearest, weight, former.clamp(low, high).to(weight.dtype))


def _layers(weights: Mapping[str, tuple[Tensor, int]]) -> Iterator[list[str]]:
    """Yield the names by decoder layer: what stands before the first number, and that number."""
    found: dict[str, list[str]] = {}
    for name in weights:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
        found.setdefault(".".join(parts[: number + 1]), []).append(name)
    yield from found.values()


def _moments(model: nn.Module, batches: Iterable[Batch], names: Sequence[str]) -> dict[str, Tensor]:
    """Return the second moments of the inputs of weights by name, each over the number of the side's tokens."""
    sums: dict[str, Tensor] = {}
    tokens = 0
    with torch.no_grad(), evaluation_mode(model), _watched(model, names, sums) as attended:
        for batch in map(padded, batches):
            call = call_of(batch)
            mask = attended_mask(batch)
            attended[:] = [call.tokens(mask.int(), 0).bool()]
            tokens += int(mask.sum())
            final_hidden_states(model, batch, call)
    return {name: total / max(tokens, 1) for name, total in sums.items()}


@contextlib.contextmanager
def _watched(model: nn.Module, names: Sequence[str], sums: dict[str, Tensor]) -> Iterator[list[Tensor]]:
    """Add the second moments of the inputs of the named weights to `sums`; yields where to put the attended tokens."""
    attended: list[Tensor] = []

    def add(name: str, inputs: Tensor, expert: int | None = None, of: int = 0) -> None:
        own = inputs.float()
        product = own.T @ own
        if name not in sums:
            sums[name] = product.new_zeros((*([of] if expert is not None else []), *product.shape))
        (sums[name] if expert is None else sums[name][expert]).add_(product)

    def of_linear(name: str) -> Any:
        def hook(module: nn.Module, args: tuple) -> None:
            rows = args[0].flatten(0, -2)
            add(name, rows[attended[0]] if len(rows) == len(attended[0]) else rows)

        return hook

    def of_experts(prefix: str) -> Any:
        def hook(module: Any, args: tuple, kwargs: dict) -> None:
            keys = ("hidden_states", "top_k_index", "top_k_weights")
            given = dict(zip(keys, args, strict=False)) | kwargs
            hidden, index, weights = (given[key][attended[0]] for key in keys)
            _add_experts(module, prefix, hidden, index, weights, add)

        return hook

    wanted, handles = set(names), []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" in wanted:
            handles.append(module.register_forward_pre_hook(of_linear(f"{name}.weight")))
    for name, module in experts_modules(model).items():
        if any(own.startswith(f"{name}.") for own in wanted):
            layout_of(module)  # an error belongs before the first pass
            handles.append(module.register_forward_pre_hook(of_experts(name), with_kwargs=True))
    try:
        yield attended
    finally:
        for handle in handles:
            handle.remove()


def _add_experts(module: Any, prefix: str, hidden: Tensor, index: Tensor, weights: Tensor, add: Any) -> None:
    """Add the inputs of both projections of each expert: the tokens routed to it, and what it makes of them."""
    layout, up_name = layout_of(module), "gate_up_proj" if module.has_gate else "up_proj"
    up, bias = getattr(module, up_name), getattr(module, f"{up_name}_bias", None)
    for expert in range(module.num_experts):
        share = torch.where(index == expert, weights, 0).sum(-1)
        rows = (index == expert).any(-1)
        own = hidden[rows]
        matrix = up[expert] if layout.transposed else up[expert].T
        z = own @ matrix if bias is None else own @ matrix + bias[expert]
        made = activate(z, layout.gate, layout.interleaved, layout.gated) * share[rows, None]
        add(f"{prefix}.{up_name}", own, expert, module.num_experts)
        add(f"{prefix}.down_proj", made, expert, module.num_experts)
