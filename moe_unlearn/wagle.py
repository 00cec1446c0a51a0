"""WAGLE: scores all weights and lets the top fraction move.

Source: NeurIPS 2024, arXiv 2410.17509; paper and released code read.

    S_i = theta_i g_f,i - (1 / gamma) g_r,i g_f,i           keep the top fraction of |S| over the whole model

The first term is the sensitivity of the forget loss, the second its correction by retained utility (equation 7 with
gamma I as the Hessian). N counts every element of `named_parameters()`, shared tensors once; equal scores go by that
order, then by flat index. The sign of the forget loss does not matter. The mask holds for the whole update: gradient,
momentum and decay (`optim`).

Native mode: gradients are means over the counted tokens of each whole set, so that gamma does not depend on batch
sizes. A score of exactly 0 is never kept: experts to which the forget set does not route and parameters without
`requires_grad` are frozen, and `fraction` may stay below `keep`.

Official mode reproduces the released code's masks wherever the score decides: gradients are sums over batches
of each batch's mean loss, gamma is its `mu`, and exactly int(keep N) weights are kept; zero scores fill up the number.
That code scores inside a trainer whose backward divides each loss by the number A of accumulated micro-batches, so that

    S_i = theta_i (g_f,i / A) - (1 / mu) (g_r,i / A) (g_f,i / A),   the ranking of gamma = A mu

with g the plain sums; `accumulation` is A, 4 in all its configurations. The released code scores in bfloat16, this one
in the model's own dtype; if the two differ, scores next to the threshold may fall on the other side.

The scores of the model are never stored or sorted: `ops.weight_score` streams histograms, parameter by parameter.
Memory: two float32 gradients of the trainable parameters, and one bit per weight. Of N ranks with whole weights each
holds one N-th of the two, and the gradient of one batch.

Several ranks share the batches, one each at a time. Each scores some rows of every parameter: its own of weights that
are sharded (`sharding`), and as many of weights that are whole on every rank. Histograms are sums over the ranks, and
equal scores go by the rows of the whole parameter: for equal gradients a mask has the bits of one process. Gradients of
whole weights are sent to the rank of their rows after each batch and added in the order of the batches, so that they
are equal. FSDP2 adds up those of sharded weights itself, N at a time on N ranks.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from moe_unlearn.masks import WeightMask
from moe_unlearn.masks.shards import shared_words
from moe_unlearn.model.batches import Batch, padded, target_mask
from moe_unlearn.model.head import token_losses
from moe_unlearn.model.modes import evaluation_mode
from moe_unlearn.ops.weight_score import BINS, FIRST_NON_FINITE_BIN, score_histogram, score_mask
from moe_unlearn.ranks import Ranks, gathered, sharded, turns
from moe_unlearn.sharding import (
    Rows,
    add_up_gradients,
    complete_,
    is_sharded,
    of_peers,
    part,
    reshard,
    rows_here,
    rows_of_work,
    rowwise,
)

_log = logging.getLogger(__name__)

#: (model, batch) -> per-token losses [B, S]
Loss = Callable[[nn.Module, Batch], Tensor]
_ALL_TIES = (1 << 62) - 1
_BLOCK = 1 << 20  # elements added up at a time


def weight_mask(
    model: nn.Module,
    forget_batches: Iterable[Batch],
    retain_batches: Iterable[Batch],
    *,
    keep: float,
    gamma: float,
    official: bool = False,
    accumulation: int = 1,
    forget_loss: Loss = token_losses,
    retain_loss: Loss = token_losses,
    ranks: Ranks | None = None,
) -> WeightMask:
    """Score all weights and keep the top fraction; see the module docstring.

    Args:
        keep: fraction to keep, in (0, 1]; gamma: the Hessian's scale, > 0.
        official: reproduce the released code; accumulation: the A of the module docstring, of official mode only.
        forget_loss, retain_loss: (model, batch) -> per-token losses [B, S], 0 where `model.batches.target_mask` is
            False; the default is the NLL.
        ranks: those that share the work, all with the same batches; None are those that share the weights out, if any.

    The model is scored in evaluation mode; its mode and its `.grad` fields are left as they were. The mean magnitudes
    of both score terms are logged. The result is deterministic if the model's backward pass is.

    Raises ValueError for keep, gamma or accumulation out of range, a set without a position that carries a loss, or a
    score that is not finite (naming the parameter).
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1]; got {keep}")
    if not gamma > 0:
        raise ValueError(f"gamma must be above 0; got {gamma}")
    if accumulation < 1 or (accumulation != 1 and not official):
        raise ValueError(f"accumulation must be at least 1, and 1 without official; got {accumulation}")
    if ranks is None or ranks.count == 1:
        ranks = Ranks(model) if sharded(model) else None
    parameters = dict(model.named_parameters())
    rows = {} if ranks is None else _rows(parameters, ranks)
    with evaluation_mode(model):
        divided = accumulation if official else None
        forget = _gradients(model, forget_batches, forget_loss, divided, "forget", ranks, rows)
        retain = _gradients(model, retain_batches, retain_loss, divided, "retain", ranks, rows)
    scored = (_SharedScored if rows else _Scored)(parameters, forget, retain, gamma, rows)
    magnitudes = scored.magnitudes()
    _log.info(
        "WAGLE score terms: mean |theta g_f| %.3e, mean |g_r g_f| / gamma %.3e (gamma %g)",
        magnitudes["forget_term"],
        magnitudes["retain_term"],
        gamma,
    )
    count = int(keep * sum(p.numel() for p in parameters.values()))
    threshold, ties = _threshold(scored, count, zeros_fill=official)
    packed = {}
    for name, terms in scored.items():
        packed[name], taken = scored.mask(name, terms, threshold, ties)
        ties -= taken
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    return WeightMask(shapes, packed, keep, gamma, official, magnitudes)


def _rows(parameters: dict[str, nn.Parameter], ranks: Ranks) -> dict[str, Rows]:
    """Return the rows that this rank scores, by parameter; one without is scored whole by every rank."""
    if ranks.sharded:
        return {name: rows_here(name, p, ranks.group) for name, p in parameters.items() if is_sharded(p)}
    assert ranks.group is not None  # there are several
    return {name: rows_of_work(p, ranks.group) for name, p in parameters.items()}


def _gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Loss,
    divided: int | None,
    side: str,
    ranks: Ranks | None,
    rows: dict[str, Rows],
) -> dict[str, Tensor]:
    """Compute the float32 gradients of a set's loss, of the rows that this rank scores.

    The loss is the mean over the set's tokens or, with `divided`, the sum over batches of their means / `divided`.
    """
    batches = [batch for batch in map(padded, batches) if target_mask(batch).any()]
    tokens = [int(target_mask(batch).sum()) for batch in batches]
    if not batches:
        raise ValueError(f"the {side} set carries no loss: it is empty or all its labels are -100")
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor) -> None:
        wide = gradient.to(torch.promote_types(trainable[name].dtype, torch.float32))
        sums[name] = sums[name] + wide if name in sums else wide

    def take(name: str) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            # one parameter at a time, so that no second gradient of the model is ever held
            assert p.grad is not None  # the hook runs once it is accumulated
            gradient, p.grad = part(p.grad), None
            add(name, gradient)

        return hook

    # ranks may meet parameters in different orders, so that they exchange gradients after the backward pass
    exchanged = ranks is not None and not ranks.sharded

    def backward(i: int, counts: bool) -> None:
        if exchanged and not counts:
            return
        with torch.enable_grad():
            value = loss(model, batches[i]).sum() / (tokens[i] * divided if divided else sum(tokens))
            # the loss has no gradient if every parameter it depends on is frozen
            if value.requires_grad:
                (value if counts else 0 * value).backward()

    held = {name: p.grad for name, p in trainable.items()}
    handles = []
    undo = None if ranks is None else add_up_gradients(model)
    try:
        for name, p in trainable.items():
            p.grad = None
            if not exchanged:
                handles.append(p.register_post_accumulate_grad_hook(take(name)))
        for i, counts in turns(range(len(batches)), ranks):
            if ranks is None or ranks.sharded:
                backward(i, counts)
            else:
                for name, gradient in _exchanged(partial(backward, i, counts), trainable, ranks, rows):
                    add(name, gradient)
    finally:
        for handle in handles:
            handle.remove()
        for name, p in trainable.items():
            p.grad = held[name]
        if undo is not None:
            undo()
            reshard(model)
    if ranks is not None and not exchanged:
        ranks.add_({name: sums.get(name) for name, p in trainable.items() if not is_sharded(p)})
    return sums


def _exchanged(
    backward: Callable[[], None], trainable: dict[str, nn.Parameter], ranks: Ranks, rows: dict[str, Rows]
) -> Iterator[tuple[str, Tensor]]:
    """Run a backward pass on each rank; yield their gradients of the rows scored here, by parameter, rank by rank."""
    made = gathered(backward, lambda _: [name for name, p in trainable.items() if p.grad is not None], ranks.group)[1]
    holders = {name: [rank for rank, names in enumerate(map(set, made)) if name in names] for name in trainable}
    for name, p in trainable.items():
        own, p.grad = p.grad, None
        if holders[name]:
            own = torch.zeros_like(p) if own is None else own
            received = of_peers(rowwise(own.detach()), [*map(len, rows[name].parts)], ranks.group)
            for rank in holders[name]:
                yield name, received[rank].clone()  # a view would keep what other ranks hold


def _row_sums(values: Tensor) -> Tensor:
    """Return the float64 sums of the rows of `values` [R, ...], added in an order that the shape of a row decides."""
    rows = (values.flatten(1) if values.dim() > 1 else values[:, None]).to(torch.float64, copy=True)
    count = rows.shape[1]
    while count > 1:
        half = count // 2
        rows[:, :half] += rows[:, count - half : count]
        count -= half
    return rows[:, :1].sum(1)


class _Scored:
    """The three tensors of each parameter's score; parameters without a forget gradient score exactly 0."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        forget: dict[str, Tensor],
        retain: dict[str, Tensor],
        gamma: float,
        rows: dict[str, Rows],
    ) -> None:
        self.parameters, self.forget, self.retain, self.gamma, self.rows = parameters, forget, retain, gamma, rows

    def items(self) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
        """Yield (name, (weight, grad_forget, grad_retain)) in `named_parameters()` order."""
        for name, p in self.parameters.items():
            own = self._own(name, p.detach())
            zero = torch.zeros((), dtype=torch.float32, device=p.device).expand(own.shape)
            if name in self.forget:
                yield name, (own, self.forget[name], self.retain.get(name, zero))
            else:
                yield name, (zero, zero, zero)

    def histogram(self, digit: int, prefix: int = 0) -> Tensor:
        """Compute the histogram of the whole model, int64 [65536] on the CPU."""
        total = torch.zeros(1 << 16, dtype=torch.int64)
        for name, terms in self.items():
            counts = score_histogram(*terms, gamma=self.gamma, digit=digit, prefix=prefix).cpu()
            if digit == 0:
                self._check_finite(name, int(counts[FIRST_NON_FINITE_BIN:].sum()))
            total = total + counts
        return total

    def mask(self, name: str, terms: tuple[Tensor, Tensor, Tensor], threshold: int, ties: int) -> tuple[Tensor, int]:
        """Return the packed mask of a parameter, and how many of `ties` scores equal to the threshold it takes."""
        words, taken = score_mask(*terms, gamma=self.gamma, threshold_bits=threshold, ties=ties)
        return words, int(taken)

    def magnitudes(self) -> dict[str, float]:
        """Compute the means over the model of |theta g_f| and |g_r g_f| / gamma, the same bits for rows of any rank."""
        sums = sum(_row_sums(self._all_rows(name, self._magnitudes(*terms)).T) for name, terms in self.items())
        forget, retain = sums.tolist() if isinstance(sums, Tensor) else (0.0, 0.0)
        count = max(sum(p.numel() for p in self.parameters.values()), 1)
        return {"forget_term": forget / count, "retain_term": retain / self.gamma / count}

    def _magnitudes(self, weight: Tensor, g_f: Tensor, g_r: Tensor) -> Tensor:
        """Compute for each of some rows the sums of |theta g_f| and |g_r g_f|, float64 [R, 2] on the CPU."""
        found = [torch.zeros(0, 2, dtype=torch.float64)]
        weight, g_f, g_r = map(rowwise, (weight, g_f, g_r))
        height = max(_BLOCK // max(weight[:1].numel(), 1), 1)
        for w, f, r in zip(*(tensor.split(height) for tensor in (weight, g_f, g_r)), strict=True):
            found.append(torch.stack([_row_sums((w.float() * f).abs()), _row_sums((r * f).abs())], 1).cpu())
        return torch.cat(found)

    def _own(self, name: str, parameter: Tensor) -> Tensor:
        """Return the rows of a parameter that this rank scores."""
        return parameter

    def _all_rows(self, name: str, values: Tensor) -> Tensor:
        """Return the values [len(parameter), ...] of all rows of a parameter from those of the rows scored here."""
        return values

    def _check_finite(self, name: str, bad: int) -> None:
        if bad:
            raise ValueError(
                f"the WAGLE score of {name} is not finite in {bad} of {self.parameters[name].numel()} places: its "
                "weights or gradients are not, or gamma is too small"
            )


class _SharedScored(_Scored):
    """The terms of this rank's rows; what is computed of them is of the whole model, the same on every rank."""

    def histogram(self, digit: int, prefix: int = 0) -> Tensor:
        counts, bad = torch.zeros(BINS, dtype=torch.int64), torch.zeros(len(self.parameters), dtype=torch.int64)
        by_place: dict[tuple, tuple[Tensor, Tensor]] = {}
        for i, (name, terms) in enumerate(self.items()):
            own = score_histogram(*terms, gamma=self.gamma, digit=digit, prefix=prefix).cpu()
            total, own_bad = by_place.setdefault(self._place(name), (counts.clone(), bad.clone()))
            total += own
            own_bad[i] = own[FIRST_NON_FINITE_BIN:].sum()
        for groups, (total, own_bad) in by_place.items():
            counts += complete_(total, groups)
            bad += complete_(own_bad, groups)
        if digit == 0:
            for name, number in zip(self.parameters, bad.tolist(), strict=True):
                self._check_finite(name, number)
        return counts

    def mask(self, name: str, terms: tuple[Tensor, Tensor, Tensor], threshold: int, ties: int) -> tuple[Tensor, int]:
        rows = self.rows.get(name)
        if rows is None:
            return super().mask(name, terms, threshold, ties)
        # equal scores are taken in the order of the rows, those of the ranks that hold rows before these first
        equal = torch.zeros(len(rows.blocks), dtype=torch.int64)
        place = rows.blocks.index(rows.held) if rows.held else 0
        if rows.held:
            equal[place] = super().mask(name, terms, threshold, _ALL_TIES)[1]
        complete_(equal, rows.reduced)
        words, _ = super().mask(name, terms, threshold, max(ties - int(equal[:place].sum()), 0))
        return shared_words(words, self.parameters[name], rows), min(ties, int(equal.sum()))

    def _own(self, name: str, parameter: Tensor) -> Tensor:
        rows = self.rows.get(name)
        if rows is None or is_sharded(parameter):
            return part(parameter)
        return rowwise(parameter)[rows.held.start : rows.held.stop]

    def _all_rows(self, name: str, values: Tensor) -> Tensor:
        rows = self.rows.get(name)
        if rows is None:
            return values
        complete = values.new_zeros(len(rowwise(self.parameters[name])), *values.shape[1:])
        complete[rows.held.start : rows.held.stop] = values
        return complete_(complete, rows.reduced)

    def _place(self, name: str) -> tuple:
        """Return the groups of ranks over which sums of a parameter are completed."""
        rows = self.rows.get(name)
        return () if rows is None else rows.reduced


def _threshold(scored: _Scored, count: int, *, zeros_fill: bool) -> tuple[int, int]:
    """Find the bit pattern of the count-th largest |S|, and how many elements equal to it are kept."""
    high_histogram = scored.histogram(0)
    if count == 0:
        return 0x7FFFFFFF, 0
    high, above = _descend(high_histogram, count)
    low, above_low = _descend(scored.histogram(1, high), count - above)
    threshold = (high << 16) | low
    if threshold == 0 and not zeros_fill:
        return 0, 0
    return threshold, count - above - above_low


def _descend(histogram: Tensor, count: int) -> tuple[int, int]:
    """Find the bin that holds the count-th largest element, and the number of elements in higher bins."""
    from_top = histogram.flip(0).cumsum(0)
    position = int((from_top < count).sum())
    return len(histogram) - 1 - position, int(from_top[position] - histogram[len(histogram) - 1 - position])
