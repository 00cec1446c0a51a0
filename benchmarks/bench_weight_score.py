"""The global threshold of WAGLE's score and its mask, against what WAGLE's own code does today.

Rival: the scores of all tensors concatenated, ranked by a double argsort, the largest ranks as one bool a
weight. Its extra memory is counted by hand: 4 bytes of scores, twice 8 of ranks and 1 of mask a weight, and the
sorts' own; ours is the mask of one bit a weight and the 65536 counts.
"""

import torch

from benchmarks.harness import compare, write
from moe_unlearn.ops import score_histogram, score_mask, weight_score
from moe_unlearn.ops.bits import unpack_bits

SHAPE, TENSORS, KEPT, GAMMA = (4, 256, 1024), 4, 0.8, 0.5


def tensors(dtype):
    generator = torch.Generator().manual_seed(0)
    return [
        tuple((torch.randn(SHAPE, generator=generator) * scale).to(dtype) for scale in (0.02, 1e-3, 1e-3))
        for _ in range(TENSORS)
    ]


def ours(layers):
    """The packed masks of the KEPT largest |S| of all layers."""
    left = round(KEPT * sum(terms[0].numel() for terms in layers))
    pattern = 0
    for digit in (0, 1):
        counts = sum(score_histogram(*t, gamma=GAMMA, digit=digit, prefix=pattern, impl="cpu") for t in layers)
        at_least = counts.flip(0).cumsum(0).flip(0)
        found = int((at_least >= left).nonzero().max())
        left -= int(at_least[found] - counts[found])
        pattern = pattern << 16 | found
    masks = []
    for terms in layers:
        words, taken = score_mask(*terms, gamma=GAMMA, threshold_bits=pattern, ties=left, impl="cpu")
        left -= int(taken)
        masks.append(words)
    return masks


def theirs(layers):
    """WAGLE's way: concatenate, rank by two sorts, compare the rank."""
    scores = [-((w.float() - g_r.float() / GAMMA) * g_f.float()).abs() for w, g_f, g_r in layers]
    ranks = torch.cat([s.flatten() for s in scores]).argsort().argsort()
    keep = round(KEPT * len(ranks))
    return [(part < keep).view(SHAPE) for part in ranks.split(scores[0].numel())]


def topk(layers):
    """What a careful user writes: one partial selection of the concatenated scores."""
    scores = [((w.float() - g_r.float() / GAMMA) * g_f.float()).abs() for w, g_f, g_r in layers]
    flat = torch.cat([s.flatten() for s in scores])
    threshold = flat.kthvalue(len(flat) - round(KEPT * len(flat)) + 1).values
    return [s >= threshold for s in scores]


def main():
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        layers = tensors(dtype)
        name = str(dtype).removeprefix("torch.")
        masks, expected = ours(layers), theirs(layers)
        differing = sum(int((unpack_bits(m, SHAPE[-1]) != e).sum()) for m, e in zip(masks, expected, strict=True))
        contenders = {
            "ours": lambda x=layers: ours(x),
            "concatenate + double argsort": lambda x=layers: theirs(x),
            "concatenate + kthvalue": lambda x=layers: topk(x),
        }
        result = compare(f"threshold and mask, {name}", contenders, target=20, rounds=3)
        result["weights"] = TENSORS * layers[0][0].numel()
        # the sort is not stable, so that equal scores at the threshold may be chosen differently
        result["elements_chosen_differently"] = differing
        result["extra_bytes_per_weight"] = {"ours": 1 / 8, "concatenate + double argsort": 4 + 8 + 8 + 1}
        results.append(result)
        terms = layers[0]
        parts = {
            "score": lambda t, impl: weight_score(*t, gamma=GAMMA, impl=impl),
            "histogram": lambda t, impl: score_histogram(*t, gamma=GAMMA, digit=0, impl=impl),
            "mask": lambda t, impl: score_mask(*t, gamma=GAMMA, threshold_bits=0x35000000, ties=5, impl=impl),
        }
        for part, function in parts.items():
            pair = {impl: lambda f=function, i=impl, t=terms: f(t, i) for impl in ("cpu", "ref")}
            results.append(compare(f"{part}, {name}", pair))
    write("weight_score", results)


if __name__ == "__main__":
    main()
