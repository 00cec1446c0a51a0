"""Narrow moments: the specification by numbers, blocks under masks, and the same bits in every implementation."""

import math

import numpy as np
import pytest
import torch

from moe_unlearn.ops.bits import pack_bits, philox_words, round_stochastic
from moe_unlearn.ops.masked_update import AdamW, Update, masked_adamw_, masked_adamw_ref
from moe_unlearn.ops.moments import BLOCK, PACKED, narrowed, packed_zeros, row_bytes, widened
from moe_unlearn.testing import LAYOUTS
from tests.ops.masked_update.cases import (
    BF16,
    BOTH,
    F32,
    F64,
    SHAPES,
    adamw,
    apply,
    assert_same,
    check,
    given,
    inputs,
    moments,
    packed,
    randn,
    random_mask,
    run,
    same_bits,
)
from tests.support.covers import cover
from tests.support.impls import REF, impls

# NaN and infinity are meant
pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]
IMPLS = impls("masked_update")
OF_MATRICES = {name: case for name, case in SHAPES.items() if len(case[0]) > 1}


def by_numbers(m, random, second):
    """Pack one row of float32 moments as the module docstring says, number by number."""
    codes, scales = [], []
    for start in range(0, len(m), BLOCK):
        block = [np.float32(v) for v in m[start : start + BLOCK]]
        x = [np.sqrt(v) for v in block] if second else block
        limit = np.float32(255 if second else 127)
        scale = max(abs(v) for v in x) / limit if all(map(np.isfinite, x)) else np.float32(np.inf)
        for j, v in enumerate(x):
            code = 0
            if 0 < scale < np.inf:
                u = np.float32(random[start + j]) * np.float32(2.0**-16)
                code = int(min(max(np.floor(np.float32(v / scale) + u), -limit), limit))
                code = 1 if second and v > 0 and code == 0 else code
            codes.append(code % 256)
        scales.append(scale)
    codes += [0] * (-len(codes) % 4)
    return np.array(codes, np.uint8).tobytes() + np.array(scales, "<f4").tobytes()


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("n", [1, 5, 64, 70, 200])
def test_packing_is_what_the_numbers_say(n, second):
    values = randn(6, n) * 10 ** (-3 * torch.rand(6, n, generator=torch.Generator().manual_seed(1)))
    values[1], values[2], values[3, n // 2], values[4, 0] = 0, values[2] * 1e-42, torch.nan, -torch.inf
    values = values.square() if second else values
    words = torch.randint(1 << 32, (6, n), generator=torch.Generator().manual_seed(2))
    found = narrowed(values, packed_zeros((6, n), values.device), None, words, second=second)
    assert found.shape == (6, row_bytes(n)) and row_bytes(70) == 80
    for row, value, word in zip(found, values, words, strict=True):
        random = (word & 0xFFFF if second else word >> 16).tolist()
        assert row.numpy().tobytes() == by_numbers(value.tolist(), random, second)


@pytest.mark.parametrize("second", [False, True])
def test_rounding_is_unbiased_and_no_second_moment_becomes_zero(second):
    """The mean of n draws between two codes: five standard deviations of at most half a code."""
    n, place = 1 << 14, torch.tensor([0.0, 1e-6, 0.3, 1.0, 17.25, 126.5, 127.0])
    limit = 255 if second else 127
    x = torch.cat([place.repeat(n, 1), torch.full((n, 1), float(limit))], 1)  # the scale is 1
    words = torch.randint(1 << 32, x.shape, generator=torch.Generator().manual_seed(2))
    stored = narrowed(x.square() if second else x, packed_zeros(x.shape, x.device), None, words, second=second)
    found = widened(stored, x.shape[1], F64, second=second)[:, :-1]
    found = found.sqrt() if second else found
    whole = place == place.round()
    assert (found[:, whole] == place[whole]).all(), "what is a code stays"
    assert ((found - place).abs() < 1).all()
    if second:
        assert (found[:, 1:] >= 1).all()
    else:
        assert ((found.mean(0) - place).abs() <= 5 * 0.5 / n**0.5).all()


def test_the_scale_of_a_block_is_its_own():
    m = torch.cat([torch.full((1, 64), 1e-30), torch.full((1, 64), 1e30), torch.full((1, 3), -1e-3)], 1)
    assert torch.allclose(widened(packed(m), 131, F32, second=False), m, rtol=1e-6, atol=0)


@cover(indirect=["impl"], impl=IMPLS, shape=tuple(OF_MATRICES), compact=(False, True), masked=(False, True))
def test_every_shape(shape, compact, masked, impl):
    shape, slices = OF_MATRICES[shape]
    for numerics, (function, options) in zip(("bf16 packed stochastic", "fp32 packed"), BOTH, strict=True):
        common, state = inputs(numerics, shape, slices=slices if compact else None, masked=masked)
        check(impl, function, common, state, **options)


@cover(
    indirect=["impl"],
    impl=IMPLS,
    layout=LAYOUTS,
    slices=(None, [0, 5, 3]),
    numerics=("fp32 packed", "bf16 master packed"),
)
def test_every_layout_of_what_is_not_packed(layout, slices, numerics, impl):
    common, state = inputs(numerics, (6, 2, 3, 70), slices=slices)
    moved = impl.moved(given(adamw, common, state), layout)
    moved |= {name: impl.moved(value) for name, value in zip(("exp_avg", "exp_avg_sq"), state, strict=True)}
    assert_same((run(REF, adamw, common, state), apply(impl, adamw, moved)))


@cover(indirect=["impl"], impl=IMPLS, rule=(0, 1))
def test_blocks_without_a_bit_keep_their_bytes_and_masked_zeros_stay(rule, impl):
    function, options = BOTH[rule]
    mask = random_mask(8, 200)
    mask[3], mask[:, 64:128] = False, False
    common, _ = inputs("fp32 packed", (8, 200))
    common |= {"mask": pack_bits(mask), "grad": randn(8, 200, seed=9), "param": randn(8, 200)}
    start = [packed(torch.where(mask, m, 0), second=i == 1) for i, m in enumerate(moments((8, 200), F32))]
    start = [s.clone() for s in start]
    for s in start:
        s[:, 64:128], s[3] = 77, 77  # codes and scales of what has no bit
    actual = check(impl, function, common, start, **options)
    for i, (new, old) in enumerate(zip(actual[1:-1], start, strict=False)):
        assert torch.equal(new[:, 64:128], old[:, 64:128]) and torch.equal(new[3], old[3])
        rows = [0, 1, 2, 4, 5, 6, 7]
        left = widened(new, 200, F32, second=i == 1)[rows]
        off = ~mask[rows]
        off[:, 64:128] = False
        assert not left[off].any() and left[mask[rows]].any()


@pytest.mark.parametrize("impl", IMPLS, indirect=True)
def test_a_block_of_which_no_moment_is_left_has_scale_0(impl):
    """Without decay the first moment is the gradient, which is 0; the last block has 5 elements, and room for 59."""
    common, state = inputs("fp32 packed", (3, 69), masked=False)
    assert state[0].any()
    actual = check(impl, adamw, common | {"grad": torch.zeros(3, 69)}, state, betas=(0.0, 0.9))
    assert not actual[1].any() and actual[2].any()


@cover(indirect=["impl"], impl=IMPLS, state=(BF16, PACKED))
def test_shards_and_slices_have_the_bits_of_the_whole(state, impl):
    param, grad, (m, v) = randn(9, 4, 70, dtype=BF16), randn(9, 4, 70, seed=1), moments((9, 4, 70), state)
    mask, rule = pack_bits(random_mask(9, 4, 70)), AdamW(lr=0.02)

    def updated(rows, first_row, slices=None):
        of_param = rows if slices is None else slice(first_row, None)
        made = [t.clone() for t in (param[of_param], grad[rows], m[rows], v[rows], mask[rows])]
        made = impl.moved(made)
        update = Update(step=2**33, rounding="stochastic", seed=5, parameter_id=3, first_row=first_row)
        where = None if slices is None else impl.moved(slices)
        masked_adamw_(*made, rule, update, slices=where, impl=impl.name)
        return [made[0].cpu() if slices is None else made[0].cpu()[slices], *(t.cpu() for t in made[2:4])]

    whole = updated(slice(None), 0)
    for part in (slice(0, 2), slice(2, 9)):
        assert all(map(same_bits, updated(part, part.start), (t[part] for t in whole)))
    few = torch.tensor([8, 3, 5])
    assert all(map(same_bits, updated(few, 2, few - 2), (t[few] for t in whole)))
    assert not all(map(same_bits, updated(slice(2, 9), 0), (t[2:] for t in whole))), "the row must matter"


def test_weights_and_moments_share_no_random_bit():
    shape, zeros = (40, 70), torch.zeros(40, 70, dtype=BF16)
    param, grad, rule = randn(*shape, dtype=BF16), randn(*shape, seed=1), AdamW(lr=0.02)
    update = Update(step=7, rounding="stochastic", seed=5, parameter_id=3)
    new = masked_adamw_ref(param, grad, zeros, zeros, None, rule, update)
    exact = rule.updated(7, param.float(), grad, zeros.float(), zeros.float())
    weights, words = philox_words(torch.arange(2800).view(shape), 7, 5, 3)
    for found, value, random in zip(new, exact, (weights, words >> 16, words & 0xFFFF), strict=False):
        assert same_bits(found, round_stochastic(value, random))


BAD = {
    "a vector": (ValueError, "of a param of at least 2 dimensions", {"param": torch.ones(40)}),
    "not contiguous": (ValueError, "must be contiguous", {"exp_avg": packed_zeros((80, 3), torch.device("cpu")).T}),
    "two dtypes": (TypeError, "must have one dtype", {"exp_avg_sq": torch.zeros(3, 40)}),
    "wide": (TypeError, "must be torch.float64, as param, or one of float32", {"param": torch.ones(3, 40).double()}),
    "shape": (
        ValueError,
        r"exp_avg must have shape \[3, 44\]; got \[3, 40\]",
        {"exp_avg": torch.zeros(3, 40, dtype=PACKED)},
    ),
}


@pytest.mark.parametrize("error, message, change", BAD.values(), ids=BAD)
def test_bad_moments(error, message, change):
    good = {"param": torch.ones(3, 40), "exp_avg": packed(torch.zeros(3, 40)), "exp_avg_sq": packed(torch.zeros(3, 40))}
    made = good | change
    with pytest.raises(error, match=message):
        masked_adamw_(
            made["param"],
            made["param"].clone(),
            made["exp_avg"],
            made["exp_avg_sq"],
            None,
            AdamW(lr=0.1),
            Update(step=1),
        )
    assert math.prod(made["param"].shape) == made["param"].sum()
