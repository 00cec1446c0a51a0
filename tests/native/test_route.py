"""route in C++: the same bits as the reference for any number of threads."""

import pytest

from moe_unlearn.testing import ROUTINGS
from tests.ops.route.cases import MANY_ROWS, SIZES, check, inputs
from tests.support.covers import cover
from tests.support.impls import CPU

pytestmark = pytest.mark.quick


@cover(indirect=["threads"], size=(*SIZES, MANY_ROWS), pattern=ROUTINGS, threads=(1, 2, 3))
def test_same_bits_as_ref_for_any_number_of_threads(pattern, size, threads):
    check(CPU, inputs(size, pattern))
