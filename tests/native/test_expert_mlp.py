"""expert_mlp in C++ against the float64 reference; its products are torch's, everything between them is ours."""

from functools import partial

import pytest
import torch

from moe_unlearn import native
from moe_unlearn.ops import Gate
from moe_unlearn.testing import check_against_ref, integers
from tests.ops.expert_mlp.cases import GATES, GPT_OSS, case, check, names_of, results
from tests.support.by_keyword import expert_mlp, expert_mlp_ref
from tests.support.covers import cover
from tests.support.impls import CPU

pytestmark = pytest.mark.quick
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SEVERAL_CHUNKS = {"tokens": 400, "experts": 2, "hidden": 70, "inner": 45}  # of at most 256 rows
MANY_ROWS = {"tokens": 700, "experts": 7, "hidden": 24, "inner": 40}
ours = partial(expert_mlp, impl="cpu")


@cover(indirect=["instruction_set"], gated=(True, False), gate=GATES, instruction_set=native.INSTRUCTION_SETS)
def test_gates(gate, gated, instruction_set):
    check(CPU, case("uniform", tokens=64, gate=gate, gated=gated, bias=True, inner=75))


@pytest.mark.parametrize("gate", [*GATES, Gate("gelu_tanh", limit=0.7, shift=1.0)], ids=str)
def test_activations_over_their_whole_range(gate):
    """Identity projections: what comes out is the activation of what goes in."""
    hidden, inner = 128, 64
    generator = torch.Generator().manual_seed(0)
    arguments = case("uniform", tokens=500, hidden=hidden, inner=inner, experts=1, top_k=1, gate=gate)
    size = 10 ** torch.linspace(-6, 1.9, 500)
    arguments["hidden_states"] = torch.randn(500, hidden, generator=generator) * size[:, None]
    arguments["gate_up_proj"], arguments["down_proj"] = torch.eye(hidden)[None], torch.eye(hidden, inner)[None]
    check_against_ref(ours, expert_mlp_ref, arguments, gradients=("hidden_states", "top_k_weights"))


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("gated", [True, False])
def test_infinite_and_nan_preactivations(gate, gated):
    """A bias sets every fourth pre-activation of gate and up to each of the values in turn."""
    arguments = case("uniform", gate=gate, gated=gated, bias=True, experts=1, top_k=1, inner=64)
    bias = arguments["gate_up_bias"]
    for i, value in enumerate((torch.inf, -torch.inf, torch.nan)):
        bias[0, i:64:4] = value
        bias[0, 64 + i :: 7] = value
    arguments["down_proj"] = torch.eye(24, 64)[None]
    for expert_impl in (ours, expert_mlp_ref):
        x = arguments["hidden_states"].detach().requires_grad_()
        z_out = expert_impl(**arguments | {"hidden_states": x})
        assert z_out.isnan().any()
    arguments["gate_up_bias"] = torch.where(bias.isnan(), 0.0, bias)
    a, b = (f(**arguments) for f in (ours, expert_mlp_ref))
    assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_several_chunks_and_ragged_words(dtype, instruction_set):
    # over hundreds of rows autograd's float32 sum of a bias' gradient is more accurate than the op's product
    bias = dtype != F32
    check(CPU, case(**SEVERAL_CHUNKS, dtype=dtype, bias=bias))
    check(CPU, case(**SEVERAL_CHUNKS, dtype=dtype, bias=bias, gate=GPT_OSS, interleaved=True, transposed=True))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("gate", [Gate(), Gate("gelu"), Gate("gelu_tanh")], ids=str)
def test_instruction_sets_give_the_same_bits(dtype, gate):
    arguments = case(**SEVERAL_CHUNKS, dtype=dtype, bias=True, gate=gate)
    found = []
    native.narrow_products("torch")  # the baseline has no other
    for name in native.INSTRUCTION_SETS:
        native.instruction_set(name)
        found.append(results(CPU, arguments))
    native.instruction_set("")
    native.narrow_products("")
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@cover(indirect=["threads"], threads=(1, 2, 3), shape=(SEVERAL_CHUNKS, MANY_ROWS), dtype=(F32, BF16))
@pytest.mark.slow
def test_any_number_of_threads(shape, dtype, threads):
    """Ours share the work out alike; what is left is the order of a library's sums, which integers do not show."""
    check(CPU, case(**shape, dtype=dtype, bias=True))
    arguments = case(**shape, dtype=dtype, bias=True, gate=Gate("relu"))
    arguments |= {
        k: integers(*arguments[k].shape, low=-1, high=1, dtype=dtype, seed=len(k)) for k in names_of(arguments)
    }
    several = results(CPU, arguments, exact=True)
    torch.set_num_threads(1)
    for a, b in zip(several, results(CPU, arguments, exact=True), strict=True):
        assert torch.equal(a, b) and a.any()
