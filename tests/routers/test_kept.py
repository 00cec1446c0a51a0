"""Sketches, bases and projections of invariant routers, by themselves."""

import pytest
import torch

from moe_unlearn.routers.collect import shrunk
from moe_unlearn.routers.kept import Kept, hold, off, restricted

pytestmark = pytest.mark.quick


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kept(basis, **changes):
    """What one expert of a router keeps, with `basis` [R, H] and no inputs."""
    width = basis.shape[1]
    own = {"weight": torch.zeros(1, width), "basis": basis[None], "inputs": torch.zeros(0, width),
           "gap": torch.zeros(0, 1), "margin": 0.5}  # fmt: skip
    return Kept(**(own | changes))


def test_a_sketch_has_the_rows_until_it_is_full_and_then_errs_by_less_than_its_bound():
    rows = some(40, 12) * torch.logspace(0, -2, 12, dtype=torch.float64)
    assert shrunk(rows[:6], 6) is not None and torch.equal(shrunk(rows[:6], 6), rows[:6])
    sketch = rows[:0]
    for part in rows.split(7):
        sketch = shrunk(torch.cat([sketch, part]), 6)
        assert len(sketch) <= 6
    left = rows.T @ rows - sketch.T @ sketch
    values = torch.linalg.eigvalsh(left)
    # frequent directions: 0 <= A^T A - B^T B <= |A|_F^2 / rows
    assert -1e-9 < values.min() and values.max() <= rows.square().sum() / 6


def test_a_change_loses_what_lies_in_the_basis_and_nothing_else():
    basis = torch.linalg.qr(some(8, 3)).Q.T
    change = some(1, 8, seed=1)
    held = hold(change, kept(basis))
    assert (held @ basis.T).abs().max() < 1e-12
    torch.testing.assert_close(change - held, change @ basis.T @ basis)


def test_under_a_mask_only_free_coordinates_move_and_logits_stay():
    inputs = some(3, 8)
    free = torch.tensor([[1, 1, 0, 1, 0, 1, 1, 0]], dtype=torch.bool)
    own = restricted(kept(torch.linalg.qr(inputs.T).Q.T), free)
    held = hold(some(1, 8, seed=1), own)
    assert (held @ inputs.T).abs().max() < 1e-12
    assert not held[~free].any() and held[free].all()
    assert not own.closed.any()
    few = restricted(kept(torch.linalg.qr(inputs.T).Q.T), torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]], dtype=torch.bool))
    assert few.closed.all() and hold(some(1, 8, seed=1), few).abs().max() < 1e-12


def test_no_change_raises_a_logit_over_its_gap():
    basis, inputs = torch.linalg.qr(some(8, 2)).Q.T, some(6, 8, seed=2)
    gap = some(6, 1, seed=3).abs()
    gap[0] = torch.inf
    own = kept(basis, inputs=inputs, gap=gap)
    change = 3 * some(1, 8, seed=4)
    assert ((off(change, basis[None]) @ inputs.T).T > gap).any(), "the case says nothing"
    held = hold(change, own)
    assert ((held @ inputs.T).T <= gap * (1 + 1e-9)).all() and (held @ basis.T).abs().max() < 1e-12
    assert held.norm() > 0.1 * change.norm()
