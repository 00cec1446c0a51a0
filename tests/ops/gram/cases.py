"""Cases of gram: gradient sets with masks, their products by hand, and factors with the gradients that they make."""

from typing import NamedTuple

import torch

from moe_unlearn.ops import gram, gram_factors, route
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.testing import assert_as_accurate, integers, poison, routing
from tests.support.impls import REF, Impl

SHAPES = [(4, 6, 5), (33,), (7, 32), (), (0, 5), (3, 0), (1, 70)]
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def normal(shape, seed=0, dtype=F32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def whole(shape, seed=0, dtype=F32):
    return integers(*shape, seed=seed, dtype=dtype)


def half(shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.5


def gradient_sets(m, make, missing=()):
    return [
        [None if (i, p) in missing else make(shape, 100 * i + p) for p, shape in enumerate(SHAPES)] for i in range(m)
    ]


def by_hand(sets, masks=None):
    """One long float64 vector per set."""
    vectors = []
    for tensors in sets:
        parts = []
        for p, (g, shape) in enumerate(zip(tensors, SHAPES, strict=True)):
            g = torch.zeros(shape) if g is None else g
            keep = torch.ones(shape, dtype=torch.bool) if masks is None or masks[p] is None else masks[p]
            parts.append(torch.where(keep, g.double(), 0).flatten())
        vectors.append(torch.cat(parts))
    return torch.stack([torch.stack([(a * b).sum() for b in vectors]) for a in vectors])


def random_masks():
    generator = torch.Generator().manual_seed(9)
    masks = [torch.rand(shape, generator=generator) < 0.6 for shape in SHAPES]
    masks[2] = None
    return masks


def packed(masks):
    return [None if mask is None else pack_bits(mask) for mask in masks]


class Rows(NamedTuple):
    """The factors of gradients, in expert order."""

    row_gradients: list
    inputs: torch.Tensor
    expert_offsets: torch.Tensor


def factors(pattern, m, make, num_tokens=40, num_experts=5, top_k=2) -> tuple[Rows, torch.Tensor]:
    """Return factors, and the Gram matrix of the gradients [E, M, P] that they make."""
    routed = route(routing(pattern, num_tokens, num_experts, top_k), num_experts)
    rows = num_tokens * top_k
    x, dy = make((rows, 6), 0), [make((rows, 4), i + 1) for i in range(m)]
    bounds = routed.expert_offsets.tolist()
    spans = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    full = [torch.stack([d[s].double().t() @ x[s].double() for s in spans]) for d in dy]
    return Rows(dy, x, routed.expert_offsets), run(REF, [[g] for g in full])


def run(impl: Impl, sets, masks=None, layout="contiguous") -> torch.Tensor:
    """Return gram of copies of the sets and masks, on the CPU."""
    sets, masks = impl.moved((sets, masks), layout)
    with poison():
        return gram(sets, masks=masks, impl=impl.name).cpu()


def run_factors(impl: Impl, rows: Rows, layout="contiguous") -> torch.Tensor:
    """Return gram_factors of copies of the factors, on the CPU."""
    with poison():
        return gram_factors(*impl.moved(rows, layout), impl=impl.name).cpu()


def assert_same_sums(actual, truth):
    """Rounded to float32: another order of float64 sums passes, a sum in float32 or an element too few fails."""
    assert actual.dtype == F64 and torch.equal(actual, actual.t())
    assert_as_accurate(actual.float(), truth.float(), truth)
