"""What optimizers keep of a parameter in another form than float32: loaded, left out, and how well it descends."""

import copy

import pytest
import torch

from moe_unlearn.ops.moments import PACKED, widened
from moe_unlearn.optim import MaskedAdamW

pytestmark = pytest.mark.quick


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def train(optimizer, params, steps):
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = randn(*p.shape, seed=1000 * step + i).to(p.dtype)
        optimizer.step()


def test_moments_are_loaded_into_another_state():
    params = [torch.nn.Parameter(randn(7, 64))]
    optimizer = MaskedAdamW(params, numerics="stochastic")
    train(optimizer, params, 3)
    exact = optimizer.state_dict()
    for state, dtype in (("bfloat16", torch.bfloat16), ("int8", PACKED), ("float32", torch.float32)):
        other = MaskedAdamW(copy.deepcopy(params), numerics="stochastic")
        narrow = copy.deepcopy(exact)
        narrow["param_groups"][0]["state"] = state
        other.load_state_dict(narrow)
        (held,) = other.state.values()
        for name in ("exp_avg", "exp_avg_sq"):
            assert held[name].dtype == dtype
            second, truth = name == "exp_avg_sq", exact["state"][0][name]
            found = widened(held[name], 64, torch.float32, second=second)
            a, b = (found.sqrt(), truth.sqrt()) if second else (found, truth)
            # half a code of 127, and a bit for the roundings of its scale
            assert ((a - b).abs() <= b.abs().amax(1, keepdim=True) * 0.51 / 127).all()
        narrow["param_groups"][0]["state"] = "float32"
        back = MaskedAdamW(copy.deepcopy(params), numerics="stochastic")
        back.load_state_dict(other.state_dict() | {"param_groups": narrow["param_groups"]})
        assert all(s["exp_avg"].dtype == torch.float32 for s in back.state.values())


def test_vectors_and_float64_keep_their_moments():
    params = [torch.nn.Parameter(randn(64)), torch.nn.Parameter(randn(2, 64).double())]
    optimizer = MaskedAdamW(params, numerics="stochastic", state="int8")
    train(optimizer, params, 1)
    assert [optimizer.state[p]["exp_avg"].dtype for p in params] == [torch.float32, torch.float64]


@pytest.mark.parametrize("state, most", [("bfloat16", 1.1), ("int8", 2)])
def test_a_narrow_state_descends_as_float32_does(state, most):
    """Rows whose gradients spread over three decades: what blocks of codes with one scale find hardest."""

    def loss_after(state):
        scale = 10 ** (-3 * torch.rand(192, generator=torch.Generator().manual_seed(1)))
        weight = torch.nn.Parameter(torch.zeros(16, 192))
        target = randn(16, 192, seed=2) / scale.sqrt()
        optimizer = MaskedAdamW([weight], lr=0.03, weight_decay=0, numerics="stochastic", state=state)
        for step in range(150):
            x = randn(32, 192, seed=step) * scale
            weight.grad = (x @ (weight.detach() - target).T).T @ x / 32
            optimizer.step()
        return float((((weight.detach() - target) * scale) ** 2).sum())

    exact, start = loss_after("float32"), float((randn(16, 192, seed=2) ** 2).sum())
    assert exact < start / 10 and loss_after(state) <= most * exact
