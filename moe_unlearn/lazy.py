"""Sequences whose items are made when they are asked for, so that no more of them are in memory than are used."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


class Lazy(Sequence[_Item]):
    """The sequence make(0), ..., make(length - 1); an item is made anew each time, and a slice is a list."""

    def __init__(self, length: int, make: Callable[[int], _Item]):
        self._length, self._make = length, make

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: Any) -> Any:
        numbers = range(self._length)[i]  # raises IndexError past the end and counts negative positions as a list does
        return self._make(numbers) if isinstance(numbers, int) else [self._make(number) for number in numbers]


def each(items: Iterable[_Item], make: Callable[[_Item], _Made]) -> Sequence[_Made]:
    """Return make(item) of all items: in a list, or `Lazy` if they are."""
    if isinstance(items, Lazy):
        return Lazy(len(items), lambda i: make(items[i]))
    return [make(item) for item in items]


def chosen(items: Sequence[_Item], numbers: Sequence[int]) -> Sequence[_Item]:
    """Return the items of these numbers: in a list, or `Lazy` if they are."""
    if isinstance(items, Lazy):
        return Lazy(len(numbers), lambda i: items[numbers[i]])
    return [items[number] for number in numbers]
