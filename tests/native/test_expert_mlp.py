"""expert_mlp in C++ against the float64 reference; its products are torch's, everything between them is ours."""

from functools import partial

import pytest
import torch

from moe_unlearn import native
from moe_unlearn.ops import Gate
from moe_unlearn.testing import LAYOUTS, ROUTINGS, check_against_ref, in_layout, integers, poison, routing
from tests.ops.test_expert_mlp import GATES, GPT_OSS, GRADIENTS, LAYOUT_FLAGS, case
from tests.support.by_keyword import expert_mlp, expert_mlp_ref
from tests.support.covers import cover

pytestmark = pytest.mark.quick
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SEVERAL_CHUNKS = {"tokens": 400, "experts": 2, "hidden": 70, "inner": 45}  # of at most 256 rows
ours = partial(expert_mlp, impl="cpu")


def names(arguments):
    return GRADIENTS + (("gate_up_bias", "down_bias") if "down_bias" in arguments else ())


def check(arguments, **keywords):
    check_against_ref(ours, expert_mlp_ref, arguments, gradients=names(arguments), **keywords)


def results(arguments, seed=0, exact=False):
    """Output and all gradients, those of integers if `exact`."""
    leaves = {k: arguments[k].detach().requires_grad_() for k in names(arguments)}
    out = ours(**arguments | leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    upstream = upstream.clamp(-1, 1).round() if exact else upstream
    return out.detach(), *torch.autograd.grad(out, list(leaves.values()), upstream)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("pattern", [p for p in ROUTINGS if p != "all_sentinels"])
def test_routing_patterns(pattern, dtype):
    check(case(pattern, dtype=dtype, bias=True))


@pytest.mark.parametrize("flags", LAYOUT_FLAGS, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_layout_flags(flags, dtype):
    transposed, interleaved, bias, gated = flags
    check(case(transposed=transposed, interleaved=interleaved, bias=bias, gated=gated, dtype=dtype))


@cover(indirect=["instruction_set"], gated=(True, False), gate=GATES, instruction_set=native.INSTRUCTION_SETS)
def test_gates(gate, gated, instruction_set):
    check(case("uniform", tokens=64, gate=gate, gated=gated, bias=True, inner=75))


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
    check(case(**SEVERAL_CHUNKS, dtype=dtype, bias=bias))
    check(case(**SEVERAL_CHUNKS, dtype=dtype, bias=bias, gate=GPT_OSS, interleaved=True, transposed=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_memory_layouts_of_inputs_and_upstream_gradients(layout, dtype):
    arguments = case(bias=True, dtype=dtype)
    moved = {k: in_layout(v, layout) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    check(moved, gradient_layout=layout)
    check(arguments | {"hidden_states": arguments["hidden_states"][:1].expand(19, -1)}, gradient_layout=layout)


@pytest.mark.parametrize("weights", [F32, BF16, torch.float64], ids=str)
def test_routing_weights_of_their_own_dtype(weights):
    arguments = case(dtype=BF16 if weights == F32 else F32)
    arguments["top_k_weights"] = arguments["top_k_weights"].to(weights)
    check(arguments)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_integers_are_exact(transposed, dtype):
    arguments = case(transposed=transposed, gate=Gate("relu"), tokens=40, hidden=40, inner=33)
    low = 1 if dtype == BF16 else 3  # so that bfloat16 holds every sum
    arguments |= {k: integers(*arguments[k].shape, seed=len(k), low=-low, high=low, dtype=dtype) for k in GRADIENTS}
    if dtype == BF16:
        arguments["gate_up_proj"] *= (torch.rand(arguments["gate_up_proj"].shape) < 0.1).to(dtype)
        arguments["down_proj"] *= (torch.rand(arguments["down_proj"].shape) < 0.1).to(dtype)
    wide = {k: v.double() if k in GRADIENTS else v for k, v in arguments.items()}
    with poison():
        assert torch.equal(ours(**arguments).double(), expert_mlp_ref(**wide))


def test_no_token_and_one_token():
    for tokens in (0, 1):
        arguments = case("uniform", tokens=tokens, bias=True, top_k=5, dtype=BF16)
        out, *grads = results(arguments)
        assert out.shape == (tokens, 24)
        assert all(g.shape == arguments[k].shape for g, k in zip(grads, names(arguments), strict=True))
        assert tokens or not any(g.any() for g in grads)
    check(case("uniform", tokens=1, top_k=5, bias=True))


@pytest.mark.parametrize("pattern", ["sentinels", "all_sentinels"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_sentinel_rows_contribute_nothing_even_with_nan_weights(pattern, dtype):
    arguments = case(pattern, bias=True, dtype=dtype)
    here = routing(pattern, 19, 5, 2) < 5
    clean = results(arguments | {"top_k_weights": arguments["top_k_weights"].masked_fill(~here, 0.0)})
    arguments["top_k_weights"] = arguments["top_k_weights"].masked_fill(~here, torch.nan)
    with poison():
        got = results(arguments)
    for a, b in zip(got, clean, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()
    assert not got[2][~here].any()


def test_a_nan_token_stays_in_its_row():
    for dtype in (F32, BF16):
        arguments = case("uniform", dtype=dtype)
        arguments["hidden_states"][7] = torch.nan
        out = ours(**arguments)
        assert out[7].isnan().all() and out[torch.arange(19) != 7].isfinite().all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("gate", [Gate(), Gate("gelu"), Gate("gelu_tanh")], ids=str)
def test_instruction_sets_give_the_same_bits(dtype, gate):
    arguments = case(**SEVERAL_CHUNKS, dtype=dtype, bias=True, gate=gate)
    found = []
    for name in native.INSTRUCTION_SETS:
        native.instruction_set(name)
        found.append(results(arguments))
    native.instruction_set("")
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", [SEVERAL_CHUNKS, {"tokens": 700, "experts": 7, "hidden": 24, "inner": 40}], ids=str)
@pytest.mark.slow
def test_any_number_of_threads(shape, dtype, threads):
    """Ours share the work out alike; what is left is the order of a library's sums, which integers do not show."""
    check(case(**shape, dtype=dtype, bias=True))
    arguments = case(**shape, dtype=dtype, bias=True, gate=Gate("relu"))
    arguments |= {k: integers(*arguments[k].shape, low=-1, high=1, dtype=dtype, seed=len(k)) for k in names(arguments)}
    several = results(arguments, exact=True)
    torch.set_num_threads(1)
    for a, b in zip(several, results(arguments, exact=True), strict=True):
        assert torch.equal(a, b) and a.any()


def test_autocast():
    arguments = case(bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, *grads = results(arguments)
    assert out.dtype == F32 and all(g.dtype == F32 for g in grads)
    narrow = {k: v.bfloat16() if k in names(arguments) and k != "top_k_weights" else v for k, v in arguments.items()}
    assert torch.equal(out, ours(**narrow).float())
