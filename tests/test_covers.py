"""Pairwise covers: no two settings that go together are left out, and what a cover leaves out runs nightly."""

import itertools

import pytest

from tests.support.covers import cover, pairwise

pytestmark = pytest.mark.quick
AXES = {"a": (1, 2, 3), "b": (True, False), "c": ({}, {"x": 1}, {"y": 2}), "d": (None, [0])}


def cases(mark):
    """Return the settings of every case by name, and the parameters that have a mark."""
    names, params = mark.args
    return [dict(zip(names.split(","), p.values, strict=True)) for p in params], [p for p in params if p.marks]


@pytest.mark.parametrize("apart", [None, (3, True)], ids=str)
def test_every_two_settings_that_go_together_do_and_no_others(apart):
    def allowed(case):
        return apart is None or (case.get("a"), case.get("b")) != apart

    found, marked = cases(cover(allowed, **AXES))
    assert len(found) < 36 / 2 and not marked
    for (one, x), (other, y) in itertools.combinations(((k, v) for k in AXES for v in AXES[k]), 2):
        together = any(case[one] == x and case[other] == y for case in found)
        assert together == (one != other and (apart is None or (x, y) != apart)), (x, y)


def test_what_a_full_one_leaves_out_is_nightly():
    few, _ = cases(cover(**AXES))
    found, marked = cases(cover(full=True, **AXES))
    assert len(found) == 36 and found[: len(few)] == few and len(marked) == 36 - len(few)
    assert all([mark.name for mark in param.marks] == ["nightly"] for param in marked)


def test_a_cover_is_the_same_again_and_other_for_another_seed():
    axes = {name: range(4) for name in "abcde"}
    assert pairwise(axes) == pairwise(axes) != pairwise(axes, seed=1)


def test_a_single_axis_has_every_setting():
    found, _ = cases(cover(lambda case: case.get("a") != 2, a=(1, 2, 3)))
    assert found == [{"a": 1}, {"a": 3}]
