"""retain_weights: closed form, optimality, the cap and the nearest reachable targets, found independently; and the
passes over the tokens, which every implementation has, against their formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch.library import opcheck

from moe_unlearn.ops import retain_weights, retain_weights_ref
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.ops.retain_weights import moments, tilted_weights
from moe_unlearn.testing import LAYOUTS, assert_as_accurate, in_layout, integers
from tests.ops.retain_weights.cases import (
    EXACT,
    FLOAT32,
    FLOAT64,
    SIZES,
    assert_same,
    binding,
    check,
    check_solution,
    frequency,
    oracle,
    passes,
    random_members,
    run,
)
from tests.support.covers import cover
from tests.support.impls import REF, impls

pytestmark = pytest.mark.quick
IMPLS = impls("retain_weights")
NEAREST = 2e-5  # of an unreachable one: the last ridge, 1e-7, times the slope of the KL divergence there


# ---- The passes --------------------------------------------------------------------------------------------


@cover(full=True, indirect=["impl"], impl=IMPLS, capped=(False, True), num_tokens=(0, 1, 40, 129), size=SIZES)
@pytest.mark.slow(but=20)
def test_passes_against_the_formulas(size, num_tokens, capped, impl):
    made = passes(num_tokens, size, seed=size)
    check(impl, made, cap=binding(made) if capped else math.inf)


@pytest.mark.parametrize("cap", [math.inf, 1.1])
@pytest.mark.parametrize("size", [0, 1, 33])
def test_several_blocks_of_the_reference(size, cap):
    check(REF, passes(9000, size), cap=cap)


@cover(indirect=["impl"], impl=IMPLS, size=(31, 32, 40))
def test_zero_tilt_counts_exactly(size, impl):
    made = passes(70 if impl.kind in ("triton", "cuda") else 5000, size)
    made = made._replace(tilt=torch.zeros_like(made.tilt))
    _, first, second = run(impl, made, 0.0)
    assert torch.equal(second, oracle(made.members, made.tilt, 0.0)[2]) and torch.equal(first, second[0])


def test_all_tokens_at_the_cap_have_no_second_moments(impl):
    made = passes(50, 5)
    made = made._replace(tilt=torch.zeros_like(made.tilt))
    _, first, second = run(impl, made, 1.0, cap=2.0)
    assert not second.any()
    assert torch.equal(first, 2.0 * torch.cat([torch.ones(50, 1), made.members], 1).double().sum(0))
    # at the cap exactly, a token is not free
    _, first, second = run(impl, made, 0.0, cap=1.0)
    assert not second.any() and float(first[0]) == 50


def test_bias_tilt_and_cap_are_not_rounded_to_float32(impl):
    """One token: no sum whose rounding would have to be allowed."""
    bias, cap = 1 / 3, 1.7000000001
    made = passes(1, 1)._replace(members=torch.ones(1, 1).bool(), words=torch.ones(1, 1, dtype=torch.int32))
    made = made._replace(tilt=torch.tensor([1e-9], dtype=torch.float64))
    for got, gold in zip(run(impl, made, bias, cap)[1:], oracle(made.members, made.tilt, bias)[1:], strict=True):
        assert_as_accurate(got, gold, gold)
    assert run(impl, made, 5.0, cap)[1].tolist() == [cap, cap]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("one", [False, True])
def test_overflow_leaves_nan_and_infinity_where_the_reference_does(one, impl):
    """The line search refuses a step by them."""
    made = passes(40, 6)
    made.members[0] = torch.tensor([True, False, True, True, True, True])
    tilt = made.tilt.clone().index_fill(0, torch.tensor([2]), 800.0) if one else made.tilt.abs() + 300
    made = made._replace(words=pack_bits(made.members), tilt=tilt)
    for cap in (math.inf, 2.0):
        (weights, *ours), (expected, *theirs) = run(impl, made, 0.0, cap), run(REF, made, 0.0, cap)
        assert torch.equal(weights, expected)
        for got, want in zip(ours, theirs, strict=True):
            assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())


@cover(indirect=["impl"], impl=IMPLS, layout=LAYOUTS)
def test_layouts_do_not_matter(layout, impl):
    made = passes(33, 40)
    assert_same(run(impl, made, cap=1.0, layout=layout), check(impl, made, cap=1.0))


@pytest.mark.slow
def test_compiles_without_a_graph_break_and_runs_agree(impl):
    _, words, tilt = impl.moved(passes(40, 35))

    def function(words, tilt):
        options = {"cap": 2.0, "impl": impl.name}
        return tilted_weights(words, tilt, 0.1, **options), *moments(words, tilt, 0.1, **options)

    expected = function(words, tilt)
    assert_same(function(words, tilt), expected)
    assert_same(torch.compile(function, fullgraph=True, backend="aot_eager")(words, tilt), expected)


@cover(indirect=["impl"], impl=IMPLS, cap=(None, 1.6))
def test_the_solver_on_these_passes(cap, impl):
    """The whole op: reachable targets hit, weights as the reference finds them."""
    tokens, rates = (60, [0.3, 0.5]) if impl.kind in ("triton", "cuda") else (3000, torch.linspace(0.2, 0.8, 12))
    members, w = random_members(tokens, rates), integers(tokens, low=1, high=3, dtype=torch.float64)
    target = ((w / w.mean())[:, None] * members).mean(0)
    result = retain_weights(impl.moved(members), target, cap=cap, impl=impl.name)
    assert float((result.achieved - target).abs().max()) <= EXACT
    assert float((frequency(members) - target).abs().max()) > 100 * EXACT, "the target must be another one"
    check_solution(members, result, cap)
    reference = retain_weights(members, target, cap=cap, impl="ref")
    assert_as_accurate(result.weights.cpu(), reference.weights, reference.weights.double())
    assert result.ess == pytest.approx(reference.ess)


def test_opcheck():
    _, words, tilt = passes(20, 35)
    opcheck(torch.ops.moe_unlearn.retain_weights_moments.default, (words, tilt, 0.1, 2.0, "ref"))
    opcheck(torch.ops.moe_unlearn.retain_weights.default, (words, tilt, 0.1, 2.0, "ref"))


# ---- The solver --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate,target", [(0.25, 0.5), (0.25, 0.1), (0.02, 0.3), (0.9, 0.95), (0.5, 0.5)])
def test_one_expert_has_the_closed_form(rate, target):
    members = (torch.arange(1000) < 1000 * rate)[torch.randperm(1000)][:, None]
    result = retain_weights(members, torch.tensor([target], dtype=torch.float64))
    used, unused = target / rate, (1 - target) / (1 - rate)
    expected = torch.where(members[:, 0], used, unused)
    assert float((result.weights - expected).abs().max()) <= 4 * FLOAT32 * max(used, unused)
    assert float(abs(result.tilt[0] - math.log(used / unused))) <= EXACT
    check_solution(members, result)


def test_the_worked_example():
    result = retain_weights(torch.tensor([[True], [False], [False], [False]]), torch.tensor([0.5]))
    assert result.weights.tolist() == pytest.approx([2, 2 / 3, 2 / 3, 2 / 3])
    assert result.ess == pytest.approx(16 / (4 + 3 * 4 / 9))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from([None, 3.0, 20.0]))
def test_reachable_targets_are_hit(seed, experts, cap):
    """Targets are the frequencies under random weights that respect the cap, so that they can be reached."""
    generator = torch.Generator().manual_seed(seed)
    members = random_members(600, torch.rand(experts, generator=generator) * 0.6 + 0.1, seed)
    w = torch.rand(600, generator=generator).double() + 0.3
    target = ((w / w.mean())[:, None] * members).mean(0)
    result = retain_weights(members, target, cap=cap)
    assert float((result.achieved - target).abs().max()) <= EXACT
    check_solution(members, result, cap)


def test_far_targets_are_hit_and_more_experts_than_a_word():
    members = random_members(20000, [0.05, 0.1, 0.2, 0.02, 0.1])
    target = frequency(members) * torch.tensor([2, 3, 2, 5, 4.0])
    result = retain_weights(members, target)
    assert float((result.achieved - target).abs().max()) <= EXACT
    check_solution(members, result)
    members = random_members(3000, torch.linspace(0.02, 0.4, 70), seed=1)
    target = frequency(members) * 1.1
    result = retain_weights(members, target)
    assert float((result.achieved - target).abs().max()) <= EXACT
    check_solution(members, result)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_the_weights_minimise_kl(cap):
    """Moving along directions that keep mean, frequencies and cap raises sum w log w."""
    members = random_members(300, [0.2, 0.3, 0.1])
    target = frequency(members) * torch.tensor([1.5, 0.8, 1.6])
    result = retain_weights(members, target, cap=cap)
    assert float((result.achieved - target).abs().max()) <= EXACT
    w = (result.bias + members.double() @ result.tilt).exp()
    free = torch.ones_like(w, dtype=torch.bool) if cap is None else w < cap
    assert (cap is None) == bool(free.all()), "the cap must bind, or its case is not tested"
    w = w if cap is None else w.clamp_max(cap)

    def kl(weights):
        return float((weights * weights.log()).sum())

    constraints = torch.cat([torch.ones(300, 1).double(), members.double()], 1)
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        # capped tokens may only come down, and others only take up what keeps the sums
        direction = torch.randn(300, generator=generator).double()
        direction = torch.where(free, direction, -direction.abs())
        fixed = torch.where(free[:, None], constraints, 0)
        sums = torch.linalg.lstsq(fixed.t() @ fixed, constraints.t() @ direction).solution
        direction = direction - fixed @ sums
        assert float((constraints.t() @ direction).abs().max()) <= 1e4 * FLOAT64
        assert kl(w + 1e-3 * direction) > kl(w)


def test_the_cap_is_not_clip_then_renormalise():
    members = random_members(400, [0.1])
    rate = float(frequency(members))
    cap = 2.5
    result = retain_weights(members, torch.tensor([0.2]), cap=cap)
    assert float(result.achieved) == pytest.approx(0.2, abs=EXACT)  # reachable: 0.2 <= 2.5 * rate
    assert 0.2 < cap * rate
    beyond = retain_weights(members, torch.tensor([0.9]), cap=cap)
    assert float(beyond.achieved) == pytest.approx(cap * rate, abs=NEAREST)
    assert float(beyond.weights.max()) == cap
    check_solution(members, beyond, cap)


def nearest_reachable(members, target, cap):
    """Projection of the target by scipy over weights of the distinct membership patterns."""
    patterns, counts = torch.unique(members, dim=0, return_counts=True)
    a, share = patterns.double().numpy(), (counts.double() / len(members)).numpy()
    goal = target.double().numpy()
    found = minimize(
        lambda w: 0.5 * ((a.T @ (share * w) - goal) ** 2).sum(),
        share * 0 + 1,
        jac=lambda w: share * (a @ (a.T @ (share * w) - goal)),
        bounds=[(0, cap)] * len(share),
        constraints={"type": "eq", "fun": lambda w: share @ w - 1, "jac": lambda w: share},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return torch.from_numpy(a.T @ (share * found.x))


UNREACHABLE = {
    "exclusive": ([[1, 0]] * 10 + [[0, 1]] * 30 + [[0, 0]] * 60, [0.7, 0.8], None),
    "exclusive capped": ([[1, 0]] * 10 + [[0, 1]] * 30 + [[0, 0]] * 60, [0.7, 0.8], 2.0),
    "all tokens": ([[1], [0], [0]], [1.0], None),
    "no token": ([[1], [0], [0]], [0.0], None),
    "together and apart": ([[1, 1, 0]] * 5 + [[0, 0, 1]] * 5 + [[0, 0, 0]] * 10, [0.5, 0.2, 0.4], None),
    "above the cap": ([[1, 0]] * 5 + [[1, 1]] * 2 + [[0, 1]] * 9 + [[0, 0]] * 30, [0.9, 0.1], 1.5),
}


@pytest.mark.parametrize("name", UNREACHABLE)
def test_an_unreachable_target_moves_to_the_nearest_reachable(name):
    rows, target, cap = UNREACHABLE[name]
    members, target = torch.tensor(rows).bool(), torch.tensor(target)
    result = retain_weights(members, target, cap=cap)
    expected = nearest_reachable(members, target, cap)
    assert result.achieved.tolist() == pytest.approx(expected.tolist(), abs=NEAREST)
    assert float(result.tilt.abs().max()) < 50, "a tilt that float32 sums can hold"
    check_solution(members, result, cap)


@pytest.mark.slow
@pytest.mark.parametrize("cap", [None, 4.0])
def test_many_unreachable_targets_converge(cap):
    members = random_members(4000, torch.rand(32, generator=torch.Generator().manual_seed(1)) * 0.3)
    target = (3 * frequency(members)).clamp_max(1)
    result = retain_weights(members, target, cap=cap)
    assert float((result.achieved - target).abs().max()) > 0.01
    check_solution(members, result, cap)
    # at the nearest point no reachable direction comes nearer: the best vertex towards the target gains nothing
    gap = target - result.achieved
    score, order = (members.double() @ gap).sort(descending=True)
    weights = torch.zeros(4000).double()
    whole = 4000 if cap is None else cap
    weights[: int(4000 / whole)] = whole
    vertex = (weights[order.argsort()][:, None] * members).mean(0)
    assert float(gap @ (vertex - result.achieved)) <= NEAREST


@pytest.mark.parametrize("cap", [None, 3.0])
def test_members_may_count(cap):
    """How often an expert is used: weights by the same rule, and of counts up to 1 those of bool members."""
    draw = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 4, (500, 3), generator=draw) * random_members(500, [0.5, 0.3, 0.4])
    counts = torch.cat([counts, torch.full((500, 1), 2)], 1)
    target = frequency(counts) * torch.tensor([1.3, 0.8, 1.2, 1.0])
    result = retain_weights(counts, target, cap=cap)
    assert float((result.achieved - target).abs().max()) <= EXACT and result.tilt[3] == 0
    check_solution(counts, result, cap)
    members = random_members(500, [0.2, 0.3])
    once, twice = (retain_weights(given, torch.tensor([0.3, 0.3]), cap=cap) for given in (members, members.byte()))
    assert torch.equal(once.weights, twice.weights) and once.bias == twice.bias


def test_experts_that_cannot_move_are_left_out():
    members = torch.cat([random_members(50, [0.4]), torch.zeros(50, 1).bool(), torch.ones(50, 1).bool()], 1)
    result = retain_weights(members, torch.tensor([0.6, 0.5, 0.5]))
    assert result.achieved.tolist() == pytest.approx([0.6, 0.0, 1.0])
    assert result.tilt[1:].tolist() == [0, 0]
    check_solution(members, result)


@pytest.mark.parametrize("members", [torch.zeros(7, 0), torch.zeros(7, 3), torch.ones(1, 2)], ids=str)
def test_nothing_to_move_gives_ones(members):
    result = retain_weights(members.bool(), torch.full(members.shape[1:], 0.5))
    assert result.weights.tolist() == [1.0] * len(members) and result.ess == len(members)


def test_cap_one_gives_ones():
    members = random_members(40, [0.3])
    result = retain_weights(members, torch.tensor([0.9]), cap=1)
    assert result.weights.tolist() == [1.0] * 40
    assert result.achieved.tolist() == frequency(members).tolist()


def test_experts_that_always_go_together_share_the_tilt():
    members = random_members(200, [0.2]).expand(200, 2)
    result = retain_weights(members, torch.tensor([0.4, 0.4]))
    assert result.achieved.tolist() == pytest.approx([0.4, 0.4], abs=EXACT)
    assert float(result.tilt[0]) == pytest.approx(float(result.tilt[1]))


def test_members_and_targets_in_any_layout():
    members, target = random_members(64, [0.3, 0.6]), torch.tensor([0.4, 0.5])
    expected = retain_weights(members, target)
    for layout in LAYOUTS:
        moved = in_layout(members.to(torch.uint8), layout).view(torch.bool)
        assert torch.equal(retain_weights(moved, in_layout(target, layout)).weights, expected.weights)


def test_runs_agree_bitwise_and_the_reference_is_the_op():
    members = random_members(9000, [0.1, 0.2, 0.3])
    target = frequency(members) * 1.4
    for impl in ("auto", "ref"):
        runs = [retain_weights(members, target, impl=impl) for _ in range(2)]
        assert torch.equal(runs[0].weights, runs[1].weights)
    assert torch.equal(runs[0].weights, retain_weights_ref(members, target).weights)


@pytest.mark.parametrize(
    "members,target,cap,error,message",
    [
        (torch.ones(3, 1), [0.5], None, TypeError, "members must be bool, or integers that count; got torch.float32"),
        (torch.ones(3).bool(), [0.5], None, ValueError, r"\[T, S\] with T >= 1"),
        (torch.ones(0, 1).bool(), [0.5], None, ValueError, r"T >= 1; got shape \(0, 1\)"),
        (torch.ones(3, 2).bool(), [0.5], None, ValueError, r"target must be \[S\] = \[2\]"),
        (torch.ones(3, 1).bool(), [1.5], None, ValueError, r"must lie in \[0, 1\]"),
        (torch.tensor([[2], [0], [1]]), [2.5], None, ValueError, r"must lie in \[0, 2\]"),
        (torch.tensor([[2], [0], [-1]]), [0.5], None, ValueError, "must count from 0; got -1"),
        (torch.ones(3, 1).bool(), [math.nan], None, ValueError, r"must lie in \[0, 1\]"),
        (torch.ones(3, 1).bool(), [0.5], 0.9, ValueError, "cap must be at least 1"),
        (torch.ones(3, 1).bool(), [0.5], math.nan, ValueError, "cap must be at least 1"),
    ],
)
def test_bad_input_is_named(members, target, cap, error, message):
    with pytest.raises(error, match=message):
        retain_weights(members, torch.tensor(target), cap=cap)


def test_bad_words_are_named():
    words = torch.zeros(3, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"tilt must be float64 \[S\]"):
        moments(words, torch.zeros(3), 0.0)
    with pytest.raises(ValueError, match=r"\[T, 2\]"):
        moments(words, torch.zeros(40).double(), 0.0)
