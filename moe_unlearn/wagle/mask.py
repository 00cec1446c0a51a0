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

The scores of the model are never stored or sorted: `ops.weight_score` streams histograms, piece by piece, and
`threshold` finds the exact threshold from them.

Memory: `memory` bytes for the float32 gradients of both sets and for scores next to the threshold, and one bit per
weight, which lies in a file where there is a journal. Where the gradients of all weights take more, they are computed
for one group of weights after the other, in their order, each time with a pass over both sets: layers, or experts or
rows of one where a layer does not fit.
One pass more takes a sample of all scores, from which the threshold is guessed, so that one round over the groups is
enough. The mask has the same bits for every budget, as long as a layer computes the same with and without gradients,
and a gradient whichever others are computed. Beside the budget stand the weights, the activations of a pass, and one
gradient in the dtype of its weights: of a whole parameter, but of experts on our own implementation only of some.

Several ranks share the batches, one each at a time. Each scores some rows of every parameter: its own of weights that
are sharded (`sharding`), and as many of weights that are whole on every rank. The budget is that of each rank, and
groups are of parameters, the same on all ranks. Histograms are sums over the ranks, and equal scores go by the rows of
the whole parameter: for equal gradients a mask has the bits of one process, whatever the ranks and the budget.
Gradients of whole weights are sent to the rank of their rows after each batch and added in the order of the batches, so
that they are equal. FSDP2 adds up those of sharded weights itself, N at a time on N ranks.

A mask that is made in groups may keep what it has found of each one in a folder (`journal`): a run that was killed goes
on with the next group.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import nn

from moe_unlearn.masks import WeightMask
from moe_unlearn.model.batches import Batch
from moe_unlearn.model.head import token_losses
from moe_unlearn.model.modes import evaluation_mode
from moe_unlearn.model.one_copy import give_back
from moe_unlearn.model.quantised import check_whole
from moe_unlearn.ops.exact_sums import exact
from moe_unlearn.ranks import Ranks, sharded
from moe_unlearn.wagle.budget import Budget, budget_of
from moe_unlearn.wagle.gradients import Loss, Side, gradients
from moe_unlearn.wagle.journal import Journal, Resume, described
from moe_unlearn.wagle.packed import count_words
from moe_unlearn.wagle.pieces import Piece, all_pieces, grouped, sample_of, stride_of
from moe_unlearn.wagle.scores import Scored
from moe_unlearn.wagle.threshold import Found, find, guess_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rule:
    """Which scores are kept; see the module docstring.

    keep: fraction to keep, in (0, 1]; gamma: the Hessian's scale, > 0. official: reproduce the released code;
    accumulation: the A of the module docstring, of official mode only. Raises ValueError for values out of range.
    """

    keep: float
    gamma: float
    official: bool = False
    accumulation: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be in (0, 1]; got {self.keep}")
        if not self.gamma > 0:
            raise ValueError(f"gamma must be above 0; got {self.gamma}")
        if self.accumulation < 1 or (self.accumulation != 1 and not self.official):
            raise ValueError(f"accumulation must be at least 1, and 1 without official; got {self.accumulation}")


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
    memory: str | float | None = None,
) -> WeightMask:
    """Score all weights and keep the top fraction; see the module docstring.

    Args:
        keep, gamma, official, accumulation: as in `Rule`.
        forget_loss, retain_loss: (model, batch) -> per-token losses [B, S], 0 where `model.batches.target_mask` is
            False; the default is the NLL.
        memory: the budget of the module docstring, in bytes or as "512MiB"; None takes most of what the device, or on
            the CPU the process, has free. It changes no bit of the mask.

    The model is scored in evaluation mode; its mode, its flags and its `.grad` fields are left as they were. The mean
    magnitudes of both score terms are logged, and each group with the time that is left. The result is deterministic
    if the model's backward pass is.

    Raises ValueError for keep, gamma or accumulation out of range, a set without a position that carries a loss, a
    score that is not finite (naming the parameter), or a `memory` below the smallest group (naming it).
    """
    rule = Rule(keep, gamma, official, accumulation)
    return mask_of(model, forget_batches, retain_batches, rule, losses=(forget_loss, retain_loss), memory=memory)


def mask_of(
    model: nn.Module,
    forget_batches: Iterable[Batch],
    retain_batches: Iterable[Batch],
    rule: Rule,
    *,
    losses: tuple[Loss, Loss] = (token_losses, token_losses),
    memory: str | float | None = None,
    ranks: Ranks | None = None,
    resume: Resume | None = None,
) -> WeightMask:
    """Make the mask of `weight_mask` on ranks, which share the work and all have the same batches.

    None are the ranks that share the weights out, if any. `losses` are those of forget and retain. With `resume`, on
    all ranks or none, a mask in several groups goes on where an equal call was interrupted. Errors as `weight_mask`.
    """
    check_whole(model, "a mask scores the weights of the model")
    if ranks is None or ranks.count == 1:
        ranks = Ranks(model) if sharded(model) else None
    pieces = all_pieces(model, ranks)
    budget = budget_of(pieces, memory, ranks)
    divided = rule.accumulation if rule.official else None
    forget = Side.of("forget", forget_batches, losses[0], divided)
    retain = Side.of("retain", retain_batches, losses[1], divided)
    total = sum(p.numel() for p in model.parameters())
    count, guess, journal = int(rule.keep * total), None, Journal()
    with evaluation_mode(model):
        scores = _Scores(model, forget, retain, rule.gamma, ranks)
        if budget.gradients is not None:
            if resume is not None:
                trained = [name for name, p in model.named_parameters() if p.requires_grad]
                asked = [asdict(rule), str(memory), trained, *map(described, (forget, retain))]
                journal = resume.journal(asked, ranks)
            budget, guess = _begun(journal, budget, partial(scores.guess, pieces, budget, count / total))
        rounds = _Rounds(scores, grouped(pieces, budget.gradients), journal)
        storage = journal.storage(count_words(pieces))
        packed, sums = find(rounds, count, zeros_fill=rule.official, guess=guess, room=budget.room, storage=storage)
    first, second = (exact(row) for row in sums)
    magnitudes = {
        "forget_term": float(first / max(total, 1)),
        "retain_term": float(second / max(total, 1)) / rule.gamma,
    }
    _log.info(
        "WAGLE score terms: mean |theta g_f| %.3e, mean |g_r g_f| / gamma %.3e (gamma %g)",
        magnitudes["forget_term"],
        magnitudes["retain_term"],
        rule.gamma,
    )
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return WeightMask(shapes, packed, rule.keep, rule.gamma, rule.official, magnitudes)


def _begun(
    journal: Journal, budget: Budget, begin: Callable[[], tuple[Budget, range | None]]
) -> tuple[Budget, range | None]:
    """Return the budget and the guess with which a mask began, unless its budget was more than there is now."""

    def make() -> Found:
        begun, guess = begin()
        interval = (0, 0) if guess is None else (guess.start, guess.stop)
        return {"begun": torch.tensor([begun.size, begun.gradients or 0, begun.room, *interval])}

    found = journal.kept("begun", make)["begun"].tolist()
    if found[0] > budget.size:
        journal.remove()
        found = journal.kept("begun", make)["begun"].tolist()
    size, of_gradients, room, low, high = found
    return replace(budget, size=size, gradients=of_gradients, room=room), range(low, high) if high else None


@dataclass
class _Scores:
    """The scores of a model's weights, computed group by group."""

    model: nn.Module
    forget: Side
    retain: Side
    gamma: float
    ranks: Ranks | None

    def of(self, pieces: Sequence[Piece]) -> Scored:
        """Compute the gradients of some pieces, on both sides."""
        forget, retain = (gradients(self.model, side, pieces, self.ranks) for side in (self.forget, self.retain))
        return Scored(pieces, forget, retain, self.gamma)

    def guess(self, pieces: Sequence[Piece], budget: Budget, share: float) -> tuple[Budget, range | None]:
        """Guess from a sample in which interval the threshold lies, and make room for it; None without room."""
        if not budget.sample:
            return budget, None
        began = time.monotonic()
        sample = self.of(sample_of(pieces, stride_of(pieces, budget.sample)))
        guess, inside = guess_of(sample.histogram, share)
        _log.info("WAGLE: a sample of the scores took %.1f s", time.monotonic() - began)
        roomy = budget.with_room(inside * sum(piece.most for piece in pieces))
        return (budget, None) if roomy is None else (roomy, guess)


class _Rounds:
    """Goes over the groups of a mask, as `threshold.Rounds`; the scores of a single group are computed once."""

    def __init__(self, scores: _Scores, groups: Sequence[Sequence[Piece]], journal: Journal):
        self.scores, self.groups, self.journal = scores, groups, journal
        self.number = 0
        self.single = scores.of(groups[0]) if len(groups) == 1 else None

    def __call__(self, look: Callable[[Scored], Found]) -> Iterator[tuple[Sequence[Piece], Found]]:
        self.number += 1
        if self.single is not None:
            yield self.single.pieces, look(self.single)
            return
        took: list[float] = []
        for i, pieces in enumerate(self.groups, 1):
            before = len(took)
            found = self.journal.kept(f"round {self.number} group {i}", partial(self._made, look, pieces, took))
            yield pieces, found
            when = "is scored" if len(took) > before else "was scored before"
            left = sum(took) / max(len(took), 1) * (len(self.groups) - i)
            named = (self.number, i, len(self.groups), pieces[0].name, pieces[-1].name, when, left)
            _log.info("WAGLE: round %d, group %d of %d (%s to %s) %s; about %.0f s left", *named)

    def _made(self, look: Callable[[Scored], Found], pieces: Sequence[Piece], took: list[float]) -> Found:
        began = time.monotonic()
        found = look(self.scores.of(pieces))
        give_back()  # else each group's would stand beside the next one's gradients
        took.append(time.monotonic() - began)
        return found
