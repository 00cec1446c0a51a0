"""Sequences whose items are made when they are asked for: as lists are, but for when the work is done."""

import pytest

from moe_unlearn.lazy import Lazy, chosen, each

pytestmark = pytest.mark.quick


def test_items_are_made_when_they_are_asked_for_and_are_those_of_a_list():
    made = []

    def square(i):
        made.append(i)
        return i * i

    squares = Lazy(5, square)
    assert not made and len(squares) == 5 and squares[3] == squares[-2] == 9 and made == [3, 3]
    assert [*squares] == [0, 1, 4, 9, 16] and squares[1:4] == [1, 4, 9] and squares[::-2] == [16, 4, 0]
    assert not Lazy(0, square) and 16 in squares
    for past in (5, -6):
        with pytest.raises(IndexError):
            squares[past]


def test_what_is_made_of_lazy_items_is_lazy_and_else_a_list():
    lazy, made = Lazy(4, str), []
    doubled = each(lazy, lambda text: made.append(text) or text * 2)
    assert isinstance(doubled, Lazy) and not made and doubled[3] == "33" and made == ["3"]
    assert each("0123", lambda text: text * 2) == [*doubled] == ["00", "11", "22", "33"]
    some = chosen(doubled, [2, 0])
    assert isinstance(some, Lazy) and [*some] == chosen([*doubled], [2, 0]) == ["22", "00"]
