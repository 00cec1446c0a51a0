"""Other arithmetics: what each computes, and that the deviation of a sum is that of its roundings."""

import pytest
import torch

from moe_unlearn import ops
from moe_unlearn.testing import rounding, sums
from moe_unlearn.testing.rounding import arithmetic

pytestmark = pytest.mark.quick
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def operands(depth=40, dtype=F32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator).to(dtype) for shape in ((7, depth), (depth, 9)))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_exact_products_are_rounded_once(dtype):
    a, b = operands(dtype=dtype)
    bias = torch.ones(9, dtype=dtype)
    with arithmetic("exact"):
        made = a @ b, torch.nn.functional.linear(a, b.t(), bias), a.sum(1), a.mean(0, keepdim=True), (a @ b[:, 0])
    a, b = a.double(), b.double()
    wanted = a @ b, a @ b + 1, a.sum(1), a.mean(0, keepdim=True), a @ b[:, 0]
    assert all(torch.equal(x, y.to(dtype)) for x, y in zip(made, wanted, strict=True))


def test_sequential_products_are_those_of_a_loop():
    a, b = operands()
    total = torch.zeros(7, 9)
    for k in range(40):
        total = total + torch.outer(a[:, k], b[k])
    with arithmetic("sequential"):
        assert torch.equal(a @ b, total) and torch.equal((a.double() @ b.double()), a.double() @ b.double())
        assert torch.equal(torch.nn.functional.linear(a, b.t(), torch.ones(9)), total + 1)


@pytest.mark.parametrize("depth", [1, 2, 31, 32])
def test_squared_partial_sums_by_hand(depth):
    a, b = (t.double() for t in operands(depth))
    terms = a[:, :, None] * b[None]
    lanes = [terms[:, torch.cat([torch.arange(i, depth, n) for i in range(min(n, depth))])] for n in (1, 4, 16)]
    orders = [order for lane in lanes for order in (lane, lane.flip(1))]
    by_hand = torch.stack([order.cumsum(1).square().sum(1) for order in orders]).amax(0)
    total, own = terms.sum(1).square(), terms.square().sum(1)
    of_all_orders = depth * total / 3 + (depth + 1) / 6 * (own - total / depth)
    found = sums.partial_squares(a[None], b[None])[0]
    torch.testing.assert_close(found, torch.maximum(by_hand, of_all_orders) + own, rtol=1e-12, atol=1e-12)
    shuffled = [terms[:, torch.randperm(depth)].cumsum(1).square().sum(1) for _ in range(2000)]
    assert (found >= 0.9 * (torch.stack(shuffled).mean(0) + own)).all()


def test_neighbours_that_cancel_are_not_taken_for_short_sums():
    """In lanes of even width equal signs meet: a sum whose own order has small partial sums errs as a long one."""
    ones = torch.tensor([1.0, -1.0] * 64).double()
    squares = float(sums.partial_squares(ones[None, None], torch.ones(1, 128, 1).double()))
    assert squares > 64**3 / 12


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: a @ b,
        lambda a, b: torch.softmax(a, -1),
        lambda a, b: a.cumsum(1),
        lambda a, b: torch.zeros(3, 40).index_add(0, torch.tensor([0, 2, 2, 0, 2, 2, 0]), a),
    ],
    ids=["product", "softmax", "running sum", "scattered"],
)
def test_random_roundings_scatter_about_the_exact_result(function):
    a, b = operands()
    if function(a, b).shape == (3, 40):
        exact = torch.zeros(3, 40).double().index_add(0, torch.tensor([0, 2, 2, 0, 2, 2, 0]), a.double())
    else:
        exact = function(a.double(), b.double())
    runs = []
    for seed in range(64):
        with arithmetic("random", seed):
            runs.append(function(a, b))
    off = torch.stack(runs).double() - exact
    spread = off.square().mean(0).sqrt()
    assert (off.mean(0).abs() <= spread).all() and 0 < spread.max() < 1e-5
    plain = (function(a, b).double() - exact).abs()
    assert plain.max() < 6 * spread.max()


def test_equal_results_stay_equal_and_no_tie_is_broken():
    x, router = torch.full((8,), 0.3), torch.randn(16, 5).repeat(1, 2)
    with arithmetic("random"):
        assert x.exp().unique().numel() == 1
        logits = torch.randn(7, 16) @ router
    assert torch.equal(logits[:, :5], logits[:, 5:])


def loss(name):
    return lambda x, y: getattr(torch.nn.functional, name)(x, y.sigmoid())


EDGES = {
    "0-dim": lambda x, y: x[0, 0].sum() + x[0, 0].mean(-1) + torch.softmax(x[0, 0], 0),
    "nothing": lambda x, y: x[x > 99].sum() + torch.empty(3, 0).sum(1).sum(),
    "mean of nothing": lambda x, y: torch.empty(0).mean(),
    "softmax of nothing": lambda x, y: torch.softmax(torch.empty(3, 0), 1),
    "no rows": lambda x, y: torch.nn.functional.cross_entropy(x[:0], torch.empty(0).long(), reduction="sum"),
    "squeeze_": lambda x, y: x[:1].clone().squeeze_(0),
    "t_": lambda x, y: x.clone().t_(),
    "quantile": lambda x, y: x.flatten().quantile(0.3),
    "addmm_": lambda x, y: torch.ones(8, 8).addmm_(x, y.t(), beta=0.5, alpha=2),
    "beta 0": lambda x, y: torch.addmm(torch.full((8, 8), torch.nan), x, y.t(), beta=0),
    "out": lambda x, y: torch.mm(x, y.t(), out=torch.empty(0)),
    "batch norm": lambda x, y: torch.nn.functional.batch_norm(x, torch.zeros(300), torch.ones(300), training=True),
    "group norm": lambda x, y: torch.nn.functional.group_norm(x.view(2, 4, 300), 2),
    "variance": lambda x, y: torch.cat([*torch.var_mean(x, 1), x.std(0, correction=0)]),
    "float8": lambda x, y: x.to(torch.float8_e4m3fn).float(),
    "sparse": lambda x, y: torch.sparse.mm(torch.eye(8).to_sparse(), x),
    **{name: loss(name) for name in ("mse_loss", "huber_loss", "binary_cross_entropy_with_logits")},
}


@pytest.mark.parametrize("kind", rounding.ARITHMETICS)
@pytest.mark.parametrize("edge", EDGES)
def test_what_references_may_hold(edge, kind):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(8, 300, generator=generator) for _ in range(2))
    plain = EDGES[edge](x, y)
    with arithmetic(kind):
        made = EDGES[edge](x, y)
    assert made.shape == plain.shape and made.dtype == plain.dtype
    torch.testing.assert_close(made, plain, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_a_variance_is_a_sum():
    """Its order is a library's as that of any other is; the errors of the plainest loop must be within its spread."""
    x = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0)) + 3
    runs = []
    for seed in range(16):
        with arithmetic("random", seed):
            runs.append(x.var(1).double() - x.double().var(1))
    mean = x.cumsum(1)[:, -1:] / 5000
    loop = torch.zeros(4)
    for column in (x - mean).square().t():
        loop = loop + column
    spread = torch.stack(runs).square().mean(0).sqrt()
    assert ((loop / 4999).double() - x.double().var(1)).abs().max() < 6 * spread.max()


def test_runs_repeat_by_seed():
    a, b = operands()
    made = []
    for seed in (1, 1, 2):
        with arithmetic("random", seed):
            made.append(a @ b)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_exponentials_stay_in_their_range():
    """A probability of less than the smallest number is 0, not negative, and no tanh is above 1."""
    x = torch.linspace(-300, 20, 4000)
    for seed in range(4):
        with arithmetic("random", seed):
            pairs = torch.stack([torch.zeros(4000), x], 1)
            p = torch.softmax(pairs, 1)
            assert (x.exp() >= 0).all() and ((-x.abs()).exp() <= 1).all() and (p >= 0).all()
            assert (x.tanh().abs() <= 1).all() and (torch.sigmoid(x) <= 1).all() and (torch.sigmoid(x) >= 0).all()
            assert not (torch.full((9,), -1e-30) / 1e30 > 0).any()
            wide = torch.ones(3) / torch.full((3,), 3.0, dtype=torch.float64)
        assert torch.equal(wide, torch.full((3,), 1 / 3, dtype=torch.float64))


def test_runs_of_one_computation_share_their_deviations():
    """Shared ones are those of the first run; other shapes at the same place get their own."""

    def run(seed, deviations, a, b):
        with arithmetic("random", seed, deviations):
            return a @ b

    a, b = operands()
    shared = {}
    first = run(0, shared, a, b)
    assert torch.equal(first, run(0, None, a, b)) and len(shared) == 1
    torch.testing.assert_close(run(1, shared, a * (1 + 1e-6), b), run(1, None, a * (1 + 1e-6), b))
    assert len(shared) == 1
    # a thousand times the operands by the deviations of the first: errors a thousand times too small
    gold, large = 1e3 * a.double() @ b.double(), 1e3 * a
    small, right = (float((run(1, d, large, b) - gold).square().mean()) for d in (shared, None))
    assert small < right
    assert torch.equal(run(1, shared, large[:5], b), run(1, None, large[:5], b)) and len(shared) == 2


def test_what_moves_values_keeps_them_and_what_writes_does():
    x = torch.randn(5, 6)
    with arithmetic("random"):
        assert torch.equal(torch.cat([x, x]).view(2, 5, 6)[1].t().contiguous().t(), x)
        assert torch.equal(x.topk(3).values, x.sort(descending=True).values[:, :3])
        y = x.clone()
        y[1].copy_(x[2])
        assert torch.equal(y[1], x[2]) and torch.equal(y[0], x[0])
        y.mul_(1 / 3)
    assert not torch.equal(y[0], x[0]) and (y[0] * 3 - x[0]).abs().max() < 1e-6
    with arithmetic("random"):
        wide = torch.randn(3, 3, dtype=torch.float64)
        assert torch.equal(wide @ wide, wide.mm(wide))


@pytest.mark.parametrize("kind", rounding.ARITHMETICS)
def test_our_ops_in_place_do_what_they_do(kind):
    """Below autograd composite operations arrive whole: an update in place was lost there."""
    generator = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(4, 40, generator=generator) for _ in range(2))
    results = []
    for context in (torch.no_grad(), arithmetic(kind)):
        param, first, second = start.clone(), torch.zeros(4, 40), torch.zeros(4, 40)
        with context:
            ops.masked_adamw_(
                param, grad, first, second, None, ops.AdamW(lr=1e-2, weight_decay=0.1), ops.Update(step=3)
            )
        results.append((param, first, second))
    for ours, other in zip(*results, strict=True):
        assert (ours - other).abs().max() < 1e-6 and not torch.equal(other, torch.zeros(4, 40))
        assert not torch.equal(other, start)


@pytest.mark.parametrize("kind", rounding.ARITHMETICS)
def test_nan_stays_in_its_row(kind):
    a, b = operands()
    a[3, 2] = torch.nan
    places = torch.tensor([0, 1, 1, 2, 0, 1, 0])
    with arithmetic(kind):
        assert (a @ b).isnan().any(1).tolist() == [i == 3 for i in range(7)]
        assert torch.zeros(3, 40).index_add(0, places, a).isnan().any(1).tolist() == [False, False, True]


def test_an_unknown_arithmetic_is_named():
    with pytest.raises(ValueError, match="arithmetic must be one of .*; got 'sloppy'"), arithmetic("sloppy"):
        pass
