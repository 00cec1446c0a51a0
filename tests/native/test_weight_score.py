"""weight_score in C++: the same bits for every instruction set and number of threads, ties in every block included."""

import pytest

from tests.ops.weight_score.cases import (
    DTYPES,
    check,
    check_between,
    check_histograms,
    check_magnitudes,
    check_mask,
    numbers,
    patterns,
    terms,
    tied,
)
from tests.support.impls import CPU

pytestmark = pytest.mark.quick


def test_every_instruction_set(instruction_set):
    for shape in ((1,), (3, 5, 7), (2, 3, 4, 95)):
        check(CPU, terms(shape))
        check(CPU, tied(shape), gamma=1.0)
        check_between(CPU, terms(shape))
        check_magnitudes(CPU, terms(shape))
    for dtypes in DTYPES:
        check(CPU, terms((3, 70), dtypes))
        check_magnitudes(CPU, terms((3, 70), dtypes))
    check_magnitudes(CPU, numbers())


def test_same_bits_for_any_number_of_threads_with_ties_in_every_block(threads):
    """More than two of the blocks between which ties are counted, of 4096 words each."""
    given = tied((300, 1000), most=2)
    bits = patterns(given, 1.0)
    threshold = int(bits.median())
    equal = int((bits == threshold).sum())
    assert equal > 3 * 4096
    for ties in (5, equal // 2, equal - 1):
        check_mask(CPU, given, gamma=1.0, threshold=threshold, ties=ties)
    check_histograms(CPU, given, gamma=1.0)
    check_between(CPU, given, gamma=1.0)
    check_magnitudes(CPU, given)
