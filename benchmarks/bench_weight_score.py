"""Measure the global threshold of WAGLE's score and its mask against what WAGLE's own code does today.

The rival concatenates the scores of all tensors, ranks them by a double argsort, and keeps the largest ranks as one
bool a weight. A careful user's rival is one partial selection of the concatenated scores. "All of a mask's work" is
what `wagle` does with scores whose gradients are there, at once and in groups: magnitudes, guess, remembered scores.
"""

import functools

import torch
from torch import nn

from benchmarks import mask_groups
from benchmarks.harness import OURS, Case, Work, side_names, sides
from moe_unlearn.ops import score_histogram, score_mask
from moe_unlearn.ops.bits import unpack_bits
from moe_unlearn.ops.costs.weight_score import bytes_moved
from moe_unlearn.wagle.budget import budget_of
from moe_unlearn.wagle.pieces import Piece, all_pieces, sample_of, stride_of
from moe_unlearn.wagle.scores import Scored
from moe_unlearn.wagle.threshold import find, guess_of

SHAPES = {"cpu": (4, 256, 1024), "cuda": (32, 1024, 1024)}
TENSORS, KEPT, GAMMA = 4, 0.8, 0.5
ARGSORT, KTHVALUE, REF = "concatenate + double argsort", "concatenate + kthvalue", "ref"
PARTS = {
    "histogram": lambda t, impl: score_histogram(*t, gamma=GAMMA, digit=0, impl=impl),
    "mask": lambda t, impl: score_mask(*t, gamma=GAMMA, threshold_bits=0x35000000, ties=5, impl=impl),
}


def cases(device: str) -> list[Case]:
    found = []
    for dtype in ("bfloat16", "float32"):
        name, names = f"threshold and mask, {dtype}", (OURS, ARGSORT, KTHVALUE, *side_names(device))
        found.append(
            Case("weight_score", name, names, functools.partial(threshold, dtype, device), 0, 6, {"dtype": dtype})
        )
        if device == "cpu":
            names = (OURS, mask_groups.in_groups(TENSORS), ARGSORT)
            make = functools.partial(whole, dtype)
            found.append(Case("weight_score", f"all of a mask's work, {dtype}", names, make, 2, 4, {"dtype": dtype}))
        for part in PARTS:
            make, names = functools.partial(piece, part, dtype, device), (OURS, REF, *side_names(device))
            # on a GPU these cases compare the implementations
            tier = 1 if device == "cuda" else 2
            found.append(Case("weight_score", f"{part}, {dtype}", names, make, tier, 3, {"dtype": dtype}))
    return found + mask_groups.cases(device)


def tensors(dtype, device):
    generator = torch.Generator(device).manual_seed(0)
    return [
        tuple(
            torch.randn(SHAPES[device], generator=generator, device=device).mul_(scale).to(getattr(torch, dtype))
            for scale in (0.02, 1e-3, 1e-3)
        )
        for _ in range(TENSORS)
    ]


def ours(layers, impl="auto"):
    """Return the packed masks of the fraction KEPT of all layers' weights with the largest |S|."""
    left = round(KEPT * sum(terms[0].numel() for terms in layers))
    pattern = 0
    for digit in (0, 1):
        counts = sum(score_histogram(*t, gamma=GAMMA, digit=digit, prefix=pattern, impl=impl) for t in layers)
        at_least = counts.flip(0).cumsum(0).flip(0)
        found = int((at_least >= left).nonzero().max())
        left -= int(at_least[found] - counts[found])
        pattern = pattern << 16 | found
    masks = []
    for terms in layers:
        words, taken = score_mask(*terms, gamma=GAMMA, threshold_bits=pattern, ties=left, impl=impl)
        left -= int(taken)
        masks.append(words)
    return masks


def theirs(layers):
    """Return the masks WAGLE's way: concatenate, rank by two sorts, compare the rank."""
    scores = [-((w.float() - g_r.float() / GAMMA) * g_f.float()).abs() for w, g_f, g_r in layers]
    ranks = torch.cat([s.flatten() for s in scores]).argsort().argsort()
    keep = round(KEPT * len(ranks))
    return [(part < keep).view(scores[0].shape) for part in ranks.split(scores[0].numel())]


def selected(layers):
    """Return the masks as a careful user would: one partial selection of the concatenated scores."""
    scores = [((w.float() - g_r.float() / GAMMA) * g_f.float()).abs() for w, g_f, g_r in layers]
    flat = torch.cat([s.flatten() for s in scores])
    least = flat.kthvalue(len(flat) - round(KEPT * len(flat)) + 1).values
    return [s >= least for s in scores]


def threshold(dtype, device) -> Work:
    layers = tensors(dtype, device)
    masks, expected = ours(layers), theirs(layers)
    width = SHAPES[device][-1]
    differing = sum(int((unpack_bits(m, width) != e).sum()) for m, e in zip(masks, expected, strict=True))
    weights = TENSORS * layers[0][0].numel()
    each, missing = sides("weight_score.histogram", device, functools.partial(ours, layers))
    return Work(
        {
            OURS: functools.partial(ours, layers),
            ARGSORT: functools.partial(theirs, layers),
            KTHVALUE: functools.partial(selected, layers),
            **each,
        },
        missing,
        targets={ARGSORT: 20.0},
        # the three terms are read once a digit and once for the mask; the mask is written
        bytes=3 * bytes_moved(weights, layers[0][0].element_size()) + weights / 8,
        dtype=layers[0][0].dtype,
        rounds=3 if device == "cpu" else 7,
        memory=True,
        # the sort is not stable, so it may choose otherwise among equal scores at the threshold
        found={"weights": weights, "elements_chosen_differently": differing, "mask_bits_per_weight": 1},
    )


def whole(dtype) -> Work:
    """Compare what a mask does with the scores of all tensors at once, and of a tensor at a time, with the sorts."""
    layers = tensors(dtype, "cpu")
    model = nn.ParameterList([nn.Parameter(terms[0]) for terms in layers])
    pieces, weights = all_pieces(model, None), sum(terms[0].numel() for terms in layers)
    sides = [
        {piece.name: terms[i].float().flatten() for piece, terms in zip(pieces, layers, strict=True)} for i in (1, 2)
    ]
    # half more than the gradients of one tensor: some of it is room for what a guess leaves open
    budget = budget_of(pieces, 1.5 * pieces[0].nbytes)

    def scored(some: list[Piece]) -> Scored:
        forget, retain = (
            {piece: side[piece.name][piece.elements.start : piece.elements.stop : piece.elements.step].contiguous()
             for piece in some}
            for side in sides
        )  # fmt: skip
        return Scored(some, forget, retain, GAMMA)

    sample = scored(sample_of(pieces, stride_of(pieces, budget.sample)))

    def masks(groups, guess, room):
        return find(
            lambda look: ((group, look(scored(group))) for group in groups),
            round(KEPT * weights),
            zeros_fill=False,
            guess=guess,
            room=room,
        )

    def in_groups():
        guess, inside = guess_of(sample.histogram, KEPT)
        return masks([[piece] for piece in pieces], guess, budget.with_room(inside * weights).room)

    at_once = functools.partial(masks, [pieces], None, 0)
    (expected, sums), (found, others) = at_once(), in_groups()
    assert torch.equal(sums, others) and all(torch.equal(words, found[name]) for name, words in expected.items())
    return Work(
        {OURS: at_once, mask_groups.in_groups(TENSORS): in_groups, ARGSORT: functools.partial(theirs, layers)},
        targets={ARGSORT: 20.0},
        dtype=layers[0][0].dtype,
        rounds=3,
        found={"weights": weights, "sample": budget.sample},
    )


def piece(part, dtype, device) -> Work:
    terms = tensors(dtype, device)[0]
    function = PARTS[part]
    kernel = f"weight_score.{part}"
    each, missing = sides(kernel, device, functools.partial(function, terms))
    return Work(
        {OURS: lambda: function(terms, "auto"), REF: lambda: function(terms, "ref"), **each},
        missing,
        bytes=bytes_moved(terms[0].numel(), terms[0].element_size()),
        dtype=terms[0].dtype,
        found={"choice": [kernel, terms[0].numel()]},
    )
