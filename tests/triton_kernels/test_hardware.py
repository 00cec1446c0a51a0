"""The criterion allows what a GPU rounds: kernels with its approximate exponentials and quotients pass, seeded as ever.

On a GPU the same cases run with the real instructions.
"""

import functools

import numpy as np
import pytest
import torch

from moe_unlearn.ops import Gate
from moe_unlearn.testing import check_against_ref
from tests.ops.expert_mlp.cases import GPT_OSS, backward_case, case, gradients
from tests.ops.token_loss.cases import make
from tests.support.by_keyword import token_loss, token_loss_ref
from tests.support.impls import TRITON
from tests.triton_kernels import tiles
from tests.triton_kernels.hardware import LOG2_E, approximate

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # in the interpreter


@pytest.mark.parametrize("gate", [Gate("gelu_tanh"), Gate(), GPT_OSS], ids=str)
def test_gradients_of_the_gate(device, monkeypatch, gate):
    """float32, where a last bit counts, and large pre-activations, whose product with log2 e loses most."""
    tiles.expert_mlp(monkeypatch, 80)
    for seed in range(12 if gate.activation == "gelu_tanh" else 4):
        arguments = case("uniform", 16, 16, 16, experts=2, top_k=1, gate=gate, bias=True, seed=seed)
        arguments["gate_up_proj"] *= 4
        values = backward_case(device, arguments)
        with approximate(seed):
            check_against_ref(*(functools.partial(gradients, impl) for impl in ("triton", "ref")), values)


@pytest.mark.parametrize("kind", ["nll", "uce", "kl"])
def test_losses(monkeypatch, kind):
    tiles.token_loss(monkeypatch)
    inputs = TRITON.moved(make(32, 24, 70, kind=kind, seed=1))
    with approximate(1):
        check_against_ref(
            functools.partial(token_loss, impl="triton"), token_loss_ref, inputs, gradients=("hidden_states",)
        )


@pytest.mark.quick
def test_what_is_emulated():
    """exp(x) is off by a last bit, and by the rounded product; a quotient by at most two; special values by none."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    def computed(name, *values):
        handles = [TensorHandle(np.asarray(v, dtype=np.float32), tl.float32) for v in values]
        return getattr(InterpreterBuilder(), name)(*handles).data

    x = np.linspace(-20, 20, 4001, dtype=np.float32)
    special = np.array([0, -np.inf, np.inf, np.nan], dtype=np.float32)
    with approximate(), np.errstate(all="ignore"):
        exp, quotient = computed("create_exp", x), computed("create_fdiv", x, 1 + np.exp(x))
        assert np.array_equal(computed("create_exp", special), np.exp(special), equal_nan=True)
        assert np.array_equal(computed("create_fdiv", np.ones(4), special), 1 / special, equal_nan=True)
    truth = np.exp(x.astype(np.float64))
    off = np.abs(exp - truth) / np.spacing(truth.astype(np.float32))
    assert 1.4 < off[np.abs(x) < 1].max() < 2.5 and off.max() > 5
    product = np.exp2((x * LOG2_E).astype(np.float64))
    assert (np.abs(exp - product) <= 1.5 * np.spacing(product.astype(np.float32))).all()
    truth = x / (1 + np.exp(x)).astype(np.float64)
    off = np.abs(quotient - truth) / np.spacing(np.abs(truth).astype(np.float32))
    assert 1 < off.max() < 3.5
    assert torch.equal(torch.from_numpy(computed("create_exp", x)), torch.from_numpy(np.exp(x)))
