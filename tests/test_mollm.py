"""common_descent: its guarantee on random Gram matrices, optimality against a grid, and every knob."""

import itertools
import math
import operator
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_unlearn.mollm import NORMALIZE, _active_set, _cosines, common_descent, kl_active, minimum_norm

pytestmark = pytest.mark.quick
EPSILON = torch.finfo(torch.float64).eps
# inner products hold squares of lengths: what is left of a difference of two nearly equal gradients
RESOLUTION = 4 * EPSILON**0.5


def random_gradients(seed, m, dimension, *, spread=0.0, shift=0.0, repeat=False):
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(m, dimension, generator=generator, dtype=torch.float64)
    g = g + shift * torch.randn(dimension, generator=generator, dtype=torch.float64)
    g = g * 10 ** (spread * torch.randn(m, 1, generator=generator, dtype=torch.float64))
    if repeat and m > 1:
        g[-1] = g[0]
    return g


cases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**9),
        "m": st.integers(1, 7),
        "dimension": st.integers(1, 9),
        "spread": st.sampled_from([0.0, 0.5, 1.0]),
        "shift": st.sampled_from([0.0, 1.0, 3.0]),
        "repeat": st.booleans(),
    }
)


def normalised(g, normalize):
    norms = g.norm(dim=1, keepdim=True)
    return {"none": g, "unit": g / norms, "mean_norm": g / norms * norms.mean()}[normalize]


@settings(max_examples=150, deadline=None)
@given(cases, st.sampled_from(NORMALIZE))
def test_the_direction_lowers_every_objective(case, normalize):
    """<g^_i, d> >= |d|^2 for the normalised g^_i and the un-rescaled d; d from weights and coefficients agree."""
    g = random_gradients(**case)
    result = common_descent(g @ g.t(), normalize=normalize)
    kept = ~result.dropped
    hat = normalised(g[kept], normalize)
    d = result.weights[kept] @ hat
    scale = hat.norm(dim=1) * hat.norm(dim=1).max()
    assert bool((hat @ d >= d @ d - RESOLUTION * scale).all())
    assert float((result.coefficients @ g - d).norm()) <= RESOLUTION * float(hat.norm(dim=1).max())
    assert float(result.weights.sum()) == pytest.approx(1) and bool((result.weights >= 0).all())
    unit = common_descent(g @ g.t(), normalize="unit")
    assert result.stationary == unit.stationary == (float((unit.coefficients @ g).norm()) <= 1e-6)


lengths = st.lists(st.integers(-12, 12), min_size=7, max_size=7)


@settings(max_examples=150, deadline=None)
@given(cases, lengths, st.sampled_from(NORMALIZE))
def test_gradients_of_any_lengths_have_one_relative_accuracy(case, lengths, normalize):
    """<g^_i, d> >= |d|^2 but for rounding in terms of |g^_i| |d|, in exact arithmetic on the vectors themselves."""
    g = random_gradients(**case) * 10.0 ** torch.tensor(lengths[: case["m"]])[:, None]
    rows = [[Fraction(value) for value in row] for row in g.tolist()]
    gram = [[sum(map(operator.mul, a, b)) for b in rows] for a in rows]
    rounded = torch.tensor([[float(x) for x in row] for row in gram], dtype=torch.float64)
    result = common_descent(rounded, normalize=normalize, drop_below=0.0)
    if result.stationary:
        return
    c = [Fraction(value) for value in result.coefficients.tolist()]
    along = [sum(map(operator.mul, row, c)) for row in gram]
    squared = sum(map(operator.mul, c, along))
    norms = rounded.diagonal().sqrt().tolist()
    mean = sum(norms) / len(norms)
    for norm, product in zip(norms, along, strict=True):
        stretch = {"none": 1.0, "unit": 1 / norm, "mean_norm": mean / norm}[normalize]
        missed = squared - Fraction(stretch) * product
        assert missed <= Fraction(RESOLUTION) * Fraction(stretch * norm) * Fraction(math.sqrt(squared))


def test_a_long_and_a_short_gradient_that_disagree_are_not_stationary():
    """Norms 1 and 1.2e-6, cosine -0.9: the shortest point is shorter than 1e-6, and lowers both."""
    g = torch.tensor([[1.0, 0.0], [-0.9, math.sqrt(1 - 0.9**2)]]).double() * torch.tensor([[1.0], [1.2e-6]]).double()
    for order in ([0, 1], [1, 0]):
        result = common_descent(g[order] @ g[order].t())
        d = result.coefficients @ g[order]
        assert not result.stationary and (g @ d >= (1 - RESOLUTION) * (d @ d)).all()
        # and one that is opposed remains so at any length
        opposed = torch.stack([g[0], -1e-5 * g[0]])[order]
        assert common_descent(opposed @ opposed.t()).stationary


@pytest.mark.parametrize("m", [2, 3, 4])
def test_what_is_stationary_is_so_at_any_lengths(m):
    corners = torch.linspace(0, 2 * math.pi, m + 1)[:-1].double()
    around = torch.stack([corners.cos(), corners.sin()], 1)  # the origin is inside
    aside = around + torch.tensor([2.0, 0.0])
    for exponents in itertools.product((-8, 0, 8), repeat=m):
        stretch = 10.0 ** torch.tensor(exponents)[:, None].double()
        for g, stationary in ((around, True), (aside, False)):
            for normalize in NORMALIZE:
                gram = (g * stretch) @ (g * stretch).t()
                assert common_descent(gram, normalize=normalize, drop_below=0.0).stationary == stationary


@settings(max_examples=100, deadline=None)
@given(cases)
def test_the_methods_agree(case):
    """The active set finds the length that the closed form and the enumeration find."""
    g = random_gradients(**{**case, "m": case["m"] % 3 + 1})
    gram = g @ g.t()
    norms = g.norm(dim=1)
    w = norms.min() / norms
    lengths = [float((x @ g).norm()) for x in (minimum_norm(gram), w * _active_set(_cosines(gram), w))]
    assert abs(lengths[0] - lengths[1]) <= RESOLUTION * float(norms.max())


@pytest.mark.parametrize("m", [2, 3, 4])
def test_no_point_of_a_grid_is_shorter(m):
    steps = 20
    corners = [c for c in itertools.product(range(steps + 1), repeat=m) if sum(c) == steps]
    grid = torch.tensor(corners).double() / steps
    for seed in range(10):
        g = random_gradients(seed, m, 5, shift=1.0)
        best = (grid @ g).norm(dim=1).min()
        found = (minimum_norm(g @ g.t()) @ g).norm()
        assert found <= best * (1 + RESOLUTION)
        # and the grid comes near, so that it is not beaten by a point off the simplex
        assert found >= best - g.norm(dim=1).max() * m / steps


@pytest.mark.parametrize("m", [4, 5, 6])
def test_beyond_three_the_best_support_is_found(m):
    """Brute force: the minimum over all triples can only be undercut, and by the optimality conditions is not."""
    for seed in range(10):
        g = random_gradients(seed, m, 2, shift=3.0)
        found = float((minimum_norm(g @ g.t()) @ g).norm())
        # in two dimensions the nearest point lies on a segment or is the origin inside a triangle
        triples = [list(t) for t in itertools.combinations(range(m), 3)]
        best = min(float((minimum_norm(g[t] @ g[t].t()) @ g[t]).norm()) for t in triples)
        assert abs(found - best) <= RESOLUTION * float(g.norm(dim=1).max())


def test_the_worked_example():
    gram = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    plain, unit = common_descent(gram), common_descent(gram, normalize="unit")
    assert plain.weights.tolist() == pytest.approx([0.8, 0.2])
    assert unit.weights.tolist() == [0.5, 0.5] and unit.coefficients.tolist() == [0.5, 0.25]


@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_scaling_all_gradients_changes_no_weight(m):
    g = random_gradients(3, m, 6)
    for normalize in NORMALIZE:
        results = [common_descent(s * s * (g @ g.t()), normalize=normalize) for s in (1.0, 2.0**-20, 2.0**20)]
        for other in results[1:]:
            assert other.weights.tolist() == pytest.approx(results[0].weights.tolist())


@pytest.mark.parametrize("normalize", ["unit", "mean_norm"])
def test_normalised_weights_ignore_the_length_of_each_gradient(normalize):
    g = random_gradients(5, 3, 6)
    stretched = g * torch.tensor([[1.0], [64.0], [0.125]]).double()
    results = [common_descent(x @ x.t(), normalize=normalize) for x in (g, stretched)]
    assert results[0].weights.tolist() == pytest.approx(results[1].weights.tolist())


def test_without_normalisation_the_short_gradient_leads():
    g = torch.eye(2).double() * torch.tensor([[1.0], [1e-3]])
    assert common_descent(g @ g.t()).weights[1] > 0.999
    assert common_descent(g @ g.t(), normalize="unit").weights.tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_rescaling_gives_the_length_of_the_mean_gradient(normalize):
    g = random_gradients(11, 3, 8, spread=0.3)
    plain = common_descent(g @ g.t(), normalize=normalize)
    long = common_descent(g @ g.t(), normalize=normalize, rescale="mean_gradient")
    d = long.coefficients @ g
    assert float(d.norm()) == pytest.approx(float(g.mean(0).norm()))
    assert torch.equal(long.weights, plain.weights)
    ratio = long.coefficients / plain.coefficients
    assert ratio.tolist() == pytest.approx([float(ratio[0])] * 3)


def test_rescaling_averages_only_those_that_take_part():
    g = random_gradients(2, 3, 8)
    active = torch.tensor([True, False, True])
    result = common_descent(g @ g.t(), rescale="mean_gradient", active=active)
    assert result.dropped.tolist() == [False, True, False] and result.coefficients[1] == 0
    assert float((result.coefficients @ g).norm()) == pytest.approx(float(g[active].mean(0).norm()))


@pytest.mark.parametrize("rescale", ["none", "mean_gradient"])
@pytest.mark.parametrize(
    "g",
    [
        [[1.0, 0.0], [-1.0, 0.0]],
        [[1.0, 0.0], [-0.5, 1.0], [-0.5, -1.0]],
        [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]],
        [[3.0, 0.0], [-1.0, 0.0]],
    ],
    ids=len,
)
def test_opposed_gradients_are_stationary_before_any_rescaling(g, rescale):
    g = torch.tensor(g).double()
    for normalize in NORMALIZE:
        result = common_descent(g @ g.t(), normalize=normalize, rescale=rescale)
        assert result.stationary
        assert float((result.coefficients @ g).norm()) <= 1e-6
        assert result.coefficients.isfinite().all()


def test_one_objective_is_its_own_direction():
    result = common_descent(torch.tensor([[9.0]]), normalize="mean_norm", rescale="mean_gradient")
    assert result.weights.tolist() == result.coefficients.tolist() == [1.0] and not result.stationary


def test_noise_is_dropped_before_it_steers():
    """A gradient of 1e-7 of the largest would be the minimum-norm point."""
    g = random_gradients(0, 3, 20)
    g[1] *= 1e-8
    for normalize in NORMALIZE:
        result = common_descent(g @ g.t(), normalize=normalize)
        assert result.dropped.tolist() == [False, True, False] and result.weights[1] == 0
    assert common_descent(g @ g.t(), drop_below=0.0).weights[1] > 0.9


def test_an_inactive_objective_does_not_measure_the_others():
    g = random_gradients(0, 3, 20)
    g[0] *= 1e8
    result = common_descent(g @ g.t(), active=torch.tensor([False, True, True]))
    assert result.dropped.tolist() == [True, False, False] and not result.stationary


def test_nothing_left_is_stationary():
    for gram, active in ((torch.zeros(3, 3), None), (torch.eye(2), torch.zeros(2, dtype=torch.bool))):
        result = common_descent(gram, active=active, rescale="mean_gradient")
        assert result.stationary and result.dropped.all()
        assert not result.weights.any() and not result.coefficients.any()


def test_duplicates_are_harmless():
    g = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).double()
    result = common_descent(g @ g.t())
    assert (result.weights @ g).tolist() == pytest.approx([0.5, 0.5])


def test_the_gram_matrix_may_be_float32_and_is_not_changed():
    g = random_gradients(4, 3, 6)
    gram = (g @ g.t()).float()
    before = gram.clone()
    result = common_descent(gram)
    assert torch.equal(gram, before) and result.weights.dtype == torch.float64


def test_kl_floor():
    assert not kl_active(9.9, 1.0) and not kl_active(10.0, 1.0) and kl_active(10.1, 1.0)
    assert kl_active(1e-9, 0.0) and not kl_active(0.0, 0.0) and kl_active(3.0, 1.0, factor=2.0)


@pytest.mark.parametrize(
    "gram,keywords,message",
    [
        (torch.eye(2), {"normalize": "l2"}, "normalize must be one of .*got 'l2'"),
        (torch.eye(2), {"rescale": "unit"}, "rescale must be one of .*got 'unit'"),
        (torch.ones(2, 3), {}, r"gram must be \[m, m\] with m >= 1; got \[2, 3\]"),
        (torch.ones(0, 0), {}, "m >= 1"),
        (torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]]), {}, "gram must be finite"),
        (torch.tensor([[torch.inf]]), {}, "gram must be finite"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), {}, "symmetric"),
        (1e-20 * torch.tensor([[1.0, 0.5], [0.0, 1.0]]), {}, "symmetric"),
        (torch.tensor([[-1.0]]), {}, "diagonal of squares"),
        (torch.eye(2), {"active": torch.ones(3, dtype=torch.bool)}, r"active must be bool \[m\] = \[2\]"),
        (torch.eye(2), {"active": torch.ones(2)}, "active must be bool"),
    ],
)
def test_bad_input_is_named(gram, keywords, message):
    with pytest.raises(ValueError, match=message):
        common_descent(gram, **keywords)
