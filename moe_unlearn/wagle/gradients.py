"""The gradients of a group of pieces, added up over a set's batches in the dtype of sums, where they are made.

    g = sum over batches of d loss(batch) / divisor

Weights outside the group require no gradient meanwhile, so that the backward pass stops below the lowest of the group.
Expert weights that run on our own implementation hand the factors of their gradients to a sink, which makes those of
the group's experts only, some experts at a time. All others leave a gradient of the whole parameter, of which the
group's elements are taken before the next one is made.

Each batch's gradient has the dtype of its weights, and batches are added in their order: which pieces form a group
does not change a bit of any gradient, as long as layers compute the same with and without a gradient.
"""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from moe_unlearn.experts import step_inputs
from moe_unlearn.lazy import chosen, each
from moe_unlearn.model.batches import Batch, padded, target_mask
from moe_unlearn.model.one_copy import add_up
from moe_unlearn.ops.expert_wgrad import Factors, expert_wgrad
from moe_unlearn.ops.sink import GradientSink
from moe_unlearn.progress import watched
from moe_unlearn.ranks import Ranks, gathered, turns
from moe_unlearn.sharding import add_up_gradients, is_sharded, of_peers, part, reshard, rowwise
from moe_unlearn.wagle.pieces import Piece

#: (model, batch) -> per-token losses [B, S]
Loss = Callable[[nn.Module, Batch], Tensor]
Gradients = dict[Piece, Tensor]  # flat
_CHUNK = 1 << 25  # bytes of experts' gradients that a sink makes at a time


@dataclass(frozen=True)
class Side:
    """A set, forget or retain: its batches, each with what its loss, a sum over tokens, is divided by."""

    name: str
    batches: Sequence[Batch]
    divisors: Sequence[float]
    loss: Loss

    @classmethod
    def of(cls, name: str, batches: Iterable[Batch], loss: Loss, accumulation: int | None) -> "Side":
        """Return a set whose loss is the mean over its tokens or, with `accumulation`, the sum of its batches' means.

        Raises ValueError if no position carries a loss.
        """
        rows = each(batches, padded)
        every = [int(target_mask(batch).sum()) for batch in rows]
        counted = [i for i, n in enumerate(every) if n]
        if not counted:
            raise ValueError(f"the {name} set carries no loss: it is empty or all its labels are -100")
        total = sum(every)
        divisors = [every[i] * accumulation if accumulation else total for i in counted]
        return cls(name, chosen(rows, counted), divisors, loss)


def gradients(model: nn.Module, side: Side, pieces: Sequence[Piece], ranks: Ranks | None) -> Gradients:
    """Compute the gradients of a set's loss by piece, without those of parameters that the loss does not reach.

    The model's flags and `.grad` fields are as before afterwards, after an error too.
    """
    store = _Store(pieces)
    sink = _Sink(store)
    exchanged = ranks is not None and not ranks.sharded
    with contextlib.ExitStack() as inside:
        inside.enter_context(_only(model, store.pieces))
        if ranks is None:
            inside.enter_context(step_inputs(model, weight_gradients=sink))
        if not exchanged:
            inside.enter_context(store.hooks())
        if ranks is not None:
            inside.enter_context(_summed(model))
        inside.enter_context(torch.enable_grad())
        for i, counts in turns(watched(range(len(side.batches)), "gradients for the mask"), ranks):
            backward = partial(_backward, model, side, i, counts)
            if ranks is None or ranks.sharded:
                backward()
                sink.settle()
            else:
                store.exchange(backward if counts else lambda: None, ranks)
    if ranks is not None and ranks.sharded:
        ranks.add_({p.name: store.sums.get(p) for p in store.pieces.values() if not is_sharded(p.parameter)})
    return store.sums


def _backward(model: nn.Module, side: Side, i: int, counts: bool) -> None:
    """Go backward from the loss of a batch, which adds nothing unless it counts."""
    value = side.loss(model, side.batches[i]).sum() / side.divisors[i]
    # the loss has no gradient if every parameter it depends on is frozen
    if value.requires_grad:
        (value if counts else 0 * value).backward()


class _Store:
    """The sums of gradients by piece."""

    def __init__(self, pieces: Sequence[Piece]):
        self.pieces: dict[Tensor, Piece] = {p.parameter: p for p in pieces if p.parameter.requires_grad}
        self.sums: Gradients = {}

    def add(self, piece: Piece, values: Tensor, first: int) -> None:
        """Add the flat `values` of a gradient, the first of which is that of element `first` of the parameter."""
        taken, place = piece.places(first, len(values))
        if piece not in self.sums:
            self.sums[piece] = values.new_zeros(len(piece.elements), dtype=piece.gradient_dtype)
        add_up(self.sums[piece][place], values[taken])

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Take gradients out of `.grad` as soon as each is complete, so that few of them are held at a time."""
        handles = [p.register_post_accumulate_grad_hook(self._take) for p in self.pieces]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def exchange(self, backward: Callable[[], None], ranks: Ranks) -> None:
        """Run a backward pass on each rank, and add up the rows of this rank in the order of the ranks.

        Ranks may meet parameters in different orders, so that this has to wait for the end of the backward pass. An
        error on one rank ends all.
        """

        def present(_: None) -> list[str]:
            return [piece.name for p, piece in self.pieces.items() if p.grad is not None]

        given = [set(names) for names in gathered(backward, present, ranks.group)[1]]
        for p, piece in self.pieces.items():
            own, p.grad = p.grad, None
            if holders := [rank for rank, names in enumerate(given) if piece.name in names]:
                assert piece.rows is not None  # ranks share all parameters
                own = torch.zeros_like(p) if own is None else own
                received = of_peers(rowwise(own.detach()), [*map(len, piece.rows.parts)], ranks.group)
                for rank in holders:
                    self.add(piece, received[rank].reshape(-1), piece.rows.held.start * rowwise(p)[:1].numel())

    def _take(self, p: Tensor) -> None:
        if p.grad is not None:  # else the sink has it
            self.add(self.pieces[p], part(p.grad).reshape(-1), 0)
            p.grad = None


class _Sink(GradientSink):
    """Makes the gradients of the group's experts from their factors.

    A weight that the forward pass used several times waits for the factors of all its uses, since autograd adds their
    gradients before the sum over batches.
    """

    bounded = False
    owners: Mapping[str, Mapping[str, Tensor]] | None = None

    def __init__(self, store: _Store):
        self.store = store
        self.uses: dict[Tensor, int] = {}
        self.waiting: dict[Tensor, list[Factors]] = {}

    def enter(self, weight: Tensor) -> None:
        self.uses[weight] = self.uses.get(weight, 0) + 1

    def trained_slices(self, weights: Sequence[Tensor]) -> Tensor | None:
        experts = {e for weight in weights if weight in self.store.pieces for e in self._experts(weight)}
        return torch.tensor(sorted(experts), dtype=torch.int32, device=weights[0].device)

    def take(self, weight: Tensor, factors: Factors) -> None:
        self.waiting.setdefault(weight, []).append(factors)
        if len(self.waiting[weight]) >= self.uses.get(weight, 1):
            self._make(weight)

    def settle(self) -> None:
        """Finish a backward pass, which may not have met every use of a weight."""
        for weight in list(self.waiting):
            self._make(weight)
        self.uses.clear()

    def _experts(self, weight: Tensor) -> range:
        """Return the experts that have elements in the group."""
        elements, size = self.store.pieces[weight].elements, weight[0].numel()
        return range(elements.start // size, -(-elements.stop // size))

    def _make(self, weight: Tensor) -> None:
        uses, experts, size = self.waiting.pop(weight), self._experts(weight), weight[0].numel()
        at_once = max(_CHUNK // (size * weight.element_size()), 1)
        for first in range(experts.start, experts.stop, at_once):
            some = torch.arange(first, min(first + at_once, experts.stop), dtype=torch.int32, device=weight.device)
            # in the dtype of the factors and added in their order, as autograd has them
            dw, *others = (expert_wgrad(**factors._asdict(), experts=some) for factors in uses)
            for other in others:
                dw = dw + other
            self.store.add(self.store.pieces[weight], dw.reshape(-1), first * size)


@contextlib.contextmanager
def _only(model: nn.Module, wanted: Collection[Tensor]) -> Iterator[None]:
    """Let only the parameters `wanted` require a gradient, without one so far; restore flags and `.grad` afterwards."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters() if p.requires_grad]
    try:
        for p, _, _ in before:
            p.grad = None
            if p not in wanted:
                p.requires_grad_(False)
        yield
    finally:
        for p, flag, grad in before:
            p.requires_grad_(flag)
            p.grad = grad


@contextlib.contextmanager
def _summed(model: nn.Module) -> Iterator[None]:
    """Have the engine of sharded weights add gradients up over ranks inside."""
    undo = add_up_gradients(model)
    try:
        yield
    finally:
        undo()
        reshard(model)
