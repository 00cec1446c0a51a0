"""gram in C++: exact with every instruction set, in blocks, and the same bits for any number of threads."""

import pytest
import torch

from moe_unlearn import native
from moe_unlearn.ops.bits import pack_bits
from tests.ops.gram.cases import (
    BF16,
    F16,
    F32,
    assert_same_sums,
    by_hand,
    factors,
    gradient_sets,
    half,
    normal,
    packed,
    random_masks,
    run,
    run_factors,
    whole,
)
from tests.support.covers import cover
from tests.support.impls import CPU, REF

pytestmark = pytest.mark.quick


@cover(indirect=["instruction_set"], m=(1, 2, 3, 5), dtype=(F32, BF16, F16), instruction_set=native.INSTRUCTION_SETS)
def test_integers_match_bitwise(m, dtype, instruction_set):
    sets = gradient_sets(m, lambda shape, seed: whole(shape, seed, dtype), missing={(0, 1), (m - 1, 0)})
    masks = random_masks()
    assert torch.equal(run(CPU, sets), by_hand(sets))
    assert torch.equal(run(CPU, sets, packed(masks)), by_hand(sets, masks))


def test_every_instruction_set_has_the_same_bits():
    sets, masks, results = gradient_sets(3, normal), packed(random_masks()), []
    try:
        for name in native.INSTRUCTION_SETS:
            native.instruction_set(name)
            results.append(run(CPU, sets, masks))
    finally:
        native.instruction_set("")
    assert all(torch.equal(result, results[0]) for result in results)


def test_blocks_add_up_and_threads_change_no_bit(threads):
    """Several blocks, the last one short, of 65536 elements each."""
    shape = (7, 33_333)
    exact, words = [[whole(shape, seed)] for seed in range(3)], [pack_bits(half(shape))]
    for masks in (None, words):
        assert torch.equal(run(CPU, exact, masks), run(REF, exact, masks))
    sets = [[normal(shape, seed)] for seed in range(3)]
    got = run(CPU, sets, words)
    assert_same_sums(got, run(REF, sets, words))
    torch.set_num_threads(1)
    assert torch.equal(run(CPU, sets, words), got)


def test_factors_of_experts_with_several_blocks_of_rows(threads):
    """Up to 700 rows an expert, of which 128 are multiplied at a time."""
    size = {"num_tokens": 500, "num_experts": 4}
    rows, truth = factors("skewed", 2, whole, **size)
    assert int(rows.expert_offsets.diff().max()) > 2 * 128
    assert torch.equal(run_factors(CPU, rows), truth)
    rows, truth = factors("skewed", 2, normal, **size)
    assert_same_sums(run_factors(CPU, rows), truth)
