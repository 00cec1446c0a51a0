"""Pairwise covers: few cases in which every two settings that go together do."""

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest

Axes = Mapping[str, Sequence]
Case = dict[str, object]


def any_case(case: Case) -> bool:
    """Allow every case."""
    return True


def product(axes: Axes, allowed: Callable[[Case], bool] = any_case) -> Iterator[Case]:
    """Yield every case of the full product."""
    cases = (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
    return filter(allowed, cases)


def pairs(case: Case, axes: Axes) -> set[tuple]:
    """Return every two settings of a case."""
    return set(itertools.combinations(((axis, case[axis]) for axis in axes), 2))


def all_pairs(axes: Axes, allowed: Callable[[Case], bool] = any_case) -> set[tuple]:
    """Return every two settings that go together in some case; `allowed` judges parts of cases too."""
    return {
        ((a, x), (b, y))
        for a, b in itertools.combinations(axes, 2)
        for x in axes[a]
        for y in axes[b]
        if allowed({a: x, b: y})
    }


def complete(part: Case, axes: Axes, draw: random.Random, allowed: Callable[[Case], bool] = any_case) -> Case:
    """Return a case with the settings of `part`, the others drawn."""
    while True:
        case = {axis: part.get(axis, draw.choice(values)) for axis, values in axes.items()}
        if allowed(case):
            return case


def pairwise(
    axes: Axes, allowed: Callable[[Case], bool] = any_case, *, seed: int = 0, candidates: int = 40
) -> list[Case]:
    """Return cases in which every two settings that go together do: greedily the best of some drawn ones.

    Of a single axis they are its settings.
    """
    if len(axes) == 1:
        return list(product(axes, allowed))
    draw, left, cover = random.Random(seed), all_pairs(axes, allowed), []
    while left:
        first = min(left, key=repr)
        drawn = [complete(dict(first), axes, draw, allowed) for _ in range(candidates)]
        cover.append(max(drawn, key=lambda case: len(pairs(case, axes) & left)))
        left -= pairs(cover[-1], axes)
    return cover


def cover(
    allowed: Callable[[Case], bool] = any_case, *, full: bool = False, indirect: Sequence[str] = (), **axes: Sequence
):
    """Parametrize a test over a pairwise cover of `axes`.

    full: over the whole product, of which `make test` runs the cover and `make nightly` the rest.
    """

    def values(places: Case) -> Case:
        return {axis: axes[axis][place] for axis, place in places.items()}

    # by places, for settings need not be hashable
    places = {axis: range(len(settings)) for axis, settings in axes.items()}
    chosen = pairwise(places, lambda case: allowed(values(case)))
    rest = [case for case in product(places) if allowed(values(case)) and case not in chosen] if full else []
    cases = [
        pytest.param(*values(case).values(), marks=marks, id="-".join(map(str, values(case).values())))
        for group, marks in ((chosen, ()), (rest, pytest.mark.nightly))
        for case in group
    ]
    return pytest.mark.parametrize(",".join(axes), cases, indirect=indirect)
