"""first_row: a shard is rounded with the random bits of its rows in the whole weight, in every implementation."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from moe_unlearn.ops import SGD, AdamW, Update, masked_adamw_, masked_sgd_
from moe_unlearn.ops.bits import pack_bits, philox, round_stochastic
from moe_unlearn.testing import LAYOUTS
from tests.support.covers import cover
from tests.support.impls import REF, Impl, impls

pytestmark = pytest.mark.quick
SHAPES = ((200,), (9, 33), (8, 5, 34), (7, 2, 3, 40))
KEY = {"step": 3, "rounding": "stochastic", "seed": -5, "parameter_id": 1 << 33}


class Operands(NamedTuple):
    """Holds the operands of one update; `kept` are the mask's bits."""

    param: Tensor
    grad: Tensor
    state: tuple[Tensor, ...]
    kept: Tensor | None
    slices: Tensor | None


class Rule(NamedTuple):
    function: object
    numbers: SGD | AdamW
    states: int


RULES = {
    "sgd": Rule(masked_sgd_, SGD(lr=0.02, momentum=0.9), 1),
    "adamw": Rule(masked_adamw_, AdamW(lr=0.02), 2),
}


def whole(shape, rule: str, *, masked: bool, sliced: bool) -> Operands:
    generator = torch.Generator().manual_seed(len(shape))
    slices = torch.arange(shape[0] - 1, -1, -2) if sliced else None
    inner = shape if slices is None else (len(slices), *shape[1:])
    grad, *state = (torch.randn(inner, generator=generator) for _ in range(1 + RULES[rule].states))
    kept = torch.rand(inner, generator=generator) < 0.7 if masked else None
    param = torch.randn(shape, generator=generator).bfloat16()
    return Operands(param, grad, tuple(s.abs() for s in state), kept, slices)


def shard(given: Operands, first: int, last: int) -> tuple[Operands, Tensor]:
    """Return rows [first, last) of the weight and all that belongs to them, and where that stands in the whole."""
    param, grad, state, kept, slices = given
    where = torch.arange(first, last)
    if slices is not None:
        where = ((slices >= first) & (slices < last)).nonzero().flatten()
        slices = slices[where] - first
    parts = param[first:last], grad[where], tuple(s[where] for s in state), None if kept is None else kept[where]
    return Operands(*parts, slices), where


def updated(impl: Impl, rule: str, given: Operands, layout: str = "contiguous", first_row: int = 0) -> list[Tensor]:
    """Return the new weights and the new state."""
    function, numbers, _ = RULES[rule]
    mask = None if given.kept is None else pack_bits(given.kept)
    param, grad, state, mask, slices = impl.moved((*given[:3], mask, given.slices), layout)
    update = Update(**KEY, first_row=first_row)
    function(param, grad, *state, mask, numbers, update, slices=slices, impl=impl.name)
    return [t.cpu() for t in (param, *state)]


@cover(
    indirect=["impl"],
    impl=impls("masked_update"),
    rule=tuple(RULES),
    shape=SHAPES,
    layout=LAYOUTS,
    masked=(False, True),
    sliced=(False, True),
)
def test_a_shard_is_updated_as_its_rows_of_the_whole(sliced, masked, layout, shape, rule, impl):
    given = whole(shape, rule, masked=masked, sliced=sliced)
    expected = updated(REF, rule, given)
    bounds = 0, 2, shape[0] // 2, shape[0]
    for first, last in zip(bounds, bounds[1:], strict=False):
        part, where = shard(given, first, last)
        param, *state = updated(impl, rule, part, layout, first)
        assert torch.equal(param, expected[0][first:last])
        assert all(torch.equal(a, b[where]) for a, b in zip(state, expected[1:], strict=True))
        assert first == 0 or not torch.equal(param, updated(impl, rule, part, layout)[0]), "the row must matter"


@cover(indirect=["impl"], impl=impls("masked_update"), shape=SHAPES, sliced=(False, True), start=("across", "beyond"))
def test_the_counter_has_64_bits(start, sliced, shape, impl):
    param, grad, _, _, slices = whole(shape, "sgd", masked=False, sliced=sliced)
    row = param[0].numel()
    # the first counter of 33 bits is that of an element inside the shard, or long before it
    first_row = 2**32 // row - shape[0] // 2 if start == "across" else 2**37 + 3
    index = (first_row * row + torch.arange(param.numel())).view(shape)
    rows = slice(None) if slices is None else slices
    exact = torch.add(param[rows].float(), grad, alpha=-0.02)
    expected = param.clone()
    expected[rows] = round_stochastic(exact, philox(index[rows], KEY["step"], KEY["seed"], KEY["parameter_id"]))
    moved, grad, slices = impl.moved((param, grad, slices))
    masked_sgd_(
        moved, grad, None, None, SGD(lr=0.02), Update(**KEY, first_row=first_row), slices=slices, impl=impl.name
    )
    assert torch.equal(moved.cpu(), expected)


def test_a_negative_row_is_an_error():
    param = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="first_row counts from 0; got -1"):
        masked_sgd_(param, param.clone(), None, None, SGD(lr=0.1), Update(step=1, first_row=-1))
