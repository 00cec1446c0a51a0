"""Grouped weight gradients in Triton: descriptors, rows that are split among programs, and the tiles as they ship.

What the kernels compute is tested in tests/ops/expert_wgrad, with tiles as small as here.
"""

import contextlib
from unittest import mock

import pytest
import torch

from moe_unlearn.ops import SGD, Update, expert_wgrad_ref
from moe_unlearn.ops.expert_wgrad import expert_wgrad_inner, expert_wgrad_sgd_
from moe_unlearn.testing import ROUTINGS, assert_as_accurate
from moe_unlearn.testing.yardstick import Reference
from moe_unlearn.triton_kernels import configs, grouped_outer
from tests.ops.expert_wgrad.cases import (
    BF16,
    F16,
    F32,
    F64,
    ODD,
    RULES,
    SHAPE,
    E,
    check_update,
    factors,
    gold,
    keep,
    scattered,
    store,
    words_of,
)
from tests.support.impls import TRITON
from tests.triton_kernels import tiles

WITH_DESCRIPTORS = [(80, F32, ODD), (80, BF16, SHAPE), (90, BF16, SHAPE), (90, F16, SHAPE)]


@pytest.fixture(params=(80, 90))
def arch(request, monkeypatch):
    tiles.expert_wgrad(monkeypatch, request.param)
    return request.param


@contextlib.contextmanager
def split_in(count: int):
    current = configs.expert_wgrad
    with mock.patch.object(configs, "expert_wgrad", lambda *a: current(*a)._replace(splits=count)):
        yield


@pytest.mark.parametrize("aligned", [True, False])
def test_descriptors_only_where_rows_and_layout_allow_them(monkeypatch, aligned):
    monkeypatch.setenv("MOE_UNLEARN_TRITON_ARCH", "90")
    made = factors(SHAPE if aligned else ODD)
    for given, expected in ((made, (aligned, False)), (scattered(made, "neither"), (aligned, aligned))):
        given = TRITON.moved(given)
        _, tile = grouped_outer.tile_for("store", given, None)
        assert grouped_outer.factor_arguments(*given, tile).by_descriptor == expected


@pytest.mark.quick
@pytest.mark.parametrize("pattern", ["skewed", "half_empty", "one_expert", "all_sentinels"])
@pytest.mark.slow(but=1)
def test_split_rows(arch, pattern):
    """Four parts of blocks of 16 rows: some are empty, some end inside a block."""
    made, experts, kept = factors(pattern=pattern, exact=True), torch.tensor([2, 0]), keep(2, *SHAPE)
    expected, words = torch.where(kept, gold(made, experts), 0), words_of(kept)
    with split_in(4):
        assert torch.equal(store(TRITON, scattered(made, "neither")).double(), gold(made))
        got = store(TRITON, made, experts=experts, mask=words, out_dtype=F32)
        added = store(TRITON, made, experts=experts, mask=words, out=torch.ones(2, *SHAPE))
    assert torch.equal(got.double(), expected) and torch.equal(added.double(), 1 + expected)


@pytest.mark.parametrize("number, dtype, shape", WITH_DESCRIPTORS, ids=str)
def test_split_accuracy(monkeypatch, number, dtype, shape):
    tiles.expert_wgrad(monkeypatch, number)
    made = factors(shape, dtype, "one_expert")
    with split_in(3):
        baseline = Reference(lambda: expert_wgrad_ref(*made)).baseline()
        assert_as_accurate(store(TRITON, made), baseline, gold(made))


def test_rows_are_split_where_few_tiles_meet_many_rows():
    def splits(experts, rows, epilogue="store"):
        return configs.expert_wgrad(epilogue, (experts, 2048, 768), rows, True, BF16, 90, 132).splits

    assert splits(1, 8192) == 5 and splits(1, 2048) == 2 and splits(128, 8192) == 1
    assert splits(1, 512) == splits(1, 0) == splits(0, 0) == splits(1, 8192, "weights") == 1


@pytest.mark.quick
@pytest.mark.parametrize("pattern", ROUTINGS)
@pytest.mark.slow(but=1)
def test_aligned_rows_by_pointers(monkeypatch, pattern):
    tiles.expert_wgrad(monkeypatch, 80)
    made = factors(pattern=pattern, exact=True)
    assert torch.equal(store(TRITON, made).double(), gold(made))


# one case each: 128 x 256 tiles take the interpreter a second
@pytest.mark.parametrize("number, dtype", [(80, BF16), (90, BF16), (80, F32)], ids=["sm_80", "sm_90", "fp32"])
def test_shipped_tiles(monkeypatch, number, dtype):
    monkeypatch.setenv("MOE_UNLEARN_TRITON_ARCH", str(number))
    shape, bounds = (136, 264), torch.tensor([0, 180], dtype=torch.int32)
    made = factors(shape, dtype, tokens=90, exact=True)._replace(expert_offsets=bounds)
    kept, expected = keep(1, *shape), gold(made)
    masked = torch.where(kept, expected, 0)
    assert torch.equal(store(TRITON, made, out_dtype=F32).double(), expected)
    got = store(TRITON, scattered(made, "neither"), mask=words_of(kept), out_dtype=F32)
    assert torch.equal(got.double(), masked)
    given = TRITON.moved(made)
    inner = expert_wgrad_inner([given] * 2, mask=TRITON.moved(words_of(kept)), impl="triton").cpu()
    assert torch.equal(inner, masked.square().sum((1, 2))[:, None, None].expand(1, 2, 2))


@pytest.mark.parametrize("numerics", ["fp32", "bf16 stochastic", "bf16 master", "bf16 packed stochastic"])
@pytest.mark.parametrize("rule", ["adamw decay", "sgd nesterov"])
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NaN and infinity are meant
def test_updates_in_shipped_tiles(numerics, rule):
    made = factors((72, 168), F32 if numerics == "fp32" else BF16, exact=True)
    check_update(TRITON, rule, numerics, made, experts=(3,))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NaN and infinity are meant
def test_updates_by_pointers(monkeypatch, rule):
    tiles.expert_wgrad(monkeypatch, 80)
    check_update(TRITON, rule, "bf16 stochastic", factors(exact=True), experts=(3, 0))


def test_an_update_by_float64_factors_is_an_error():
    made, weight = TRITON.moved((factors(dtype=F64), torch.ones(E, *SHAPE)))
    with pytest.raises(TypeError, match="float64 factors"):
        expert_wgrad_sgd_(weight, None, made, SGD(lr=0.1), Update(step=1), impl="triton")
