"""What an invariant router keeps, and how a change of its weight is made to keep it.

Of the router of one MoE layer, with rows w_e [H] that give the logit x . w_e of an input x:

    B_e       orthonormal [R, H], its rows span the main directions of the retain inputs that chose expert e
    w0_e      the row that changes are counted from
    x_t       n retain inputs nearest to a tie, and the gap [n, E] by which each expert not chosen missed them:
              the lowest logit chosen less that expert's own

A row w_e becomes w0_e + d_e with

    d_e = P_e (w_e - w0_e),  P_e = I - B_e^T B_e                           no logit moves in the span of B_e
    d_e . x_t <= gap_te for all t that did not choose e                    no other expert comes into the top-k

The second is sought by `SWEEPS` projections onto the half-space d_e . x_t <= (1 - margin) gap_te that is violated most,
each along P_e x_t, so that the first stays true; whatever still violates gap_te then scales d_e down as far as needed.
Under a mask only the free coordinates F of a row move, and B_e is replaced by an orthonormal basis of what its rows are
in F; a direction that vanishes there falls away.

Gradients g_e become P_e g_e. That alone would not do: AdamW divides each coordinate by a length of its own, momentum
comes from before a change of the basis, and decay moves along w_e.

Source: our specification after GRIP (arXiv 2601.16905), whose paper was not read: a port of it projects updates by the
singular vectors of cached inputs and corrects margins by randomised Kaczmarz steps. Deterministic.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_unlearn.config import Router

SWEEPS = 16


@dataclass(frozen=True, eq=False)
class Kept:
    """What the router of one layer keeps; see the module docstring. All float32, on the router's device.

    `free` [E, H] bool are the coordinates that may move, None for all.
    """

    weight: Tensor  # [E, H]
    basis: Tensor  # [E, R, H], rows of 0 where an expert has fewer directions
    inputs: Tensor  # [n, H]
    gap: Tensor  # [n, E], infinite where the expert is chosen
    margin: float  # the share of a gap that stays
    free: Tensor | None = None

    @property
    def closed(self) -> Tensor:
        """Return bool [E], the rows that cannot move: their directions span all coordinates that may."""
        directions = self.basis.square().sum((1, 2)).round()
        limits = self.basis.shape[2] if self.free is None else self.free.sum(1)
        return directions >= limits

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def tensors(self) -> list[Tensor]:
        """Return all tensors."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]

    def state_dict(self) -> dict:
        """Return all as tensors and plain values."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def of(self, rows: Tensor | None) -> "Kept":
        """Return what the experts `rows` keep, int64 [M]; all of them for None."""
        if rows is None:
            return self
        free = None if self.free is None else self.free[rows]
        return Kept(self.weight[rows], self.basis[rows], self.inputs, self.gap[:, rows], self.margin, free)


def off(rows: Tensor, basis: Tensor) -> Tensor:
    """Project rows [E, H] off the bases [E, R, H]; twice, which makes the result orthogonal to the last bits."""
    basis = basis.to(rows)
    for _ in range(2):
        rows = rows - torch.einsum("er,erh->eh", torch.einsum("eh,erh->er", rows, basis), basis)
    return rows


def restricted(kept: Kept, free: Tensor) -> Kept:
    """Return what is kept where only the coordinates in `free`, bool [E, H], may move."""
    _, size, turned = torch.linalg.svd(kept.basis * free[:, None], full_matrices=False)
    floor = torch.finfo(size.dtype).eps * max(kept.basis.shape[1:])
    # rounding leaves next to nothing in the other coordinates, and they have to keep their bits
    basis = turned * (size > floor)[:, :, None] * free[:, None]
    return dataclasses.replace(kept, basis=basis, free=free)


def hold(weight: Tensor, kept: Kept) -> Tensor:
    """Return the weight [E, H], float32 or wider, with its change from `kept.weight` made to keep what is kept."""
    start = kept.weight.to(weight)
    change = weight - start
    if kept.free is not None:
        change = change * kept.free
    return start + _within_gaps(off(change, kept.basis), kept)


def _within_gaps(change: Tensor, kept: Kept) -> Tensor:
    """Return a change [E, H] that keeps every expert not chosen below the lowest logit chosen."""
    if not len(kept.inputs):
        return change
    inputs, gap = kept.inputs.to(change), kept.gap.T.to(change)
    length, tiny = inputs.square().sum(1), torch.finfo(change.dtype).eps
    limits = torch.where(gap.isinf(), gap, (1 - kept.margin) * gap)
    for _ in range(SWEEPS):
        most, worst = (change @ inputs.T - limits).max(1)
        along = inputs[worst] if kept.free is None else inputs[worst] * kept.free
        along = off(along, kept.basis)
        size = along.square().sum(1)
        # an input within the basis cannot be violated but by rounding
        step = torch.where(size > tiny * length[worst], most.clamp_min(0) / size.clamp_min(tiny * tiny), 0)
        change = change - step[:, None] * along
    rise = change @ inputs.T
    slack = 8 * tiny * change.norm(dim=1)[:, None] * length.sqrt()
    scale = torch.where(rise > gap + slack, (gap + slack) / rise, 1).amin(1)
    return change * scale[:, None]


def closed(kept: Iterable[Kept]) -> str:
    """Say how many rows of routers cannot move, since what they keep spans all that may; empty if all can."""
    shut = [row for each in kept for row in each.closed.tolist()]
    if not any(shut):
        return ""
    return f"{sum(shut)} of the {len(shut)} rows of invariant routers cannot move: retain inputs span all of them"


def check_whole(settings: Router, *, shared: bool) -> None:
    """Raise ValueError for invariant or corrected routers where ranks share weights out."""
    if (settings.mode == "invariant" or settings.correct) and shared:
        asked = "router.correct" if settings.correct else "router.mode invariant"
        raise ValueError(f"{asked} needs whole weights on each rank, not those of a mesh: router: frozen, or no mesh")


def kept_bytes(settings: Router, weight: Tensor, *, masked: bool) -> int:
    """Compute the bytes of what the router with this weight [E, H] keeps, at most; twice the basis under a mask."""
    experts, width = weight.shape
    basis = min(settings.rank, width) * experts * width
    numbers = (1 + masked) * basis + experts * width + settings.margin_inputs * (width + experts)
    return numbers * max(weight.itemsize, torch.float32.itemsize) + masked * weight.numel()
