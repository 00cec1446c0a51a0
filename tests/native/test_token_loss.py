"""token_loss in C++: every instruction set, widths, numbers of rows and of threads, and what its forward keeps."""

import pytest
import torch

from moe_unlearn import native
from moe_unlearn.ops.token_loss import IGNORED, KINDS
from moe_unlearn.testing import assert_as_accurate, integers
from moe_unlearn.testing.yardstick import Reference
from tests.ops.token_loss.cases import GRADIENTS, SIZES, check, loss_and_gradients, make, one_hot
from tests.support.by_keyword import token_loss, token_loss_ref
from tests.support.impls import CPU

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# tokens: three forward blocks; vocabulary: three forward tiles and six of the backward, the last ones odd
TOKENS, HIDDEN, VOCABULARY = SIZES["cpu"]


def several_tiles(kind, dtype=F32, hidden=HIDDEN, **options):
    return make(TOKENS, hidden, VOCABULARY, kind=kind, dtype=dtype, **options)


def run(inputs, upstream=None, names=GRADIENTS):
    """Return the loss and the gradients of the inputs named."""
    loss, grads = loss_and_gradients(
        CPU, inputs, names, torch.ones(len(inputs["labels"])) if upstream is None else upstream
    )
    return loss, *grads


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_every_instruction_set(dtype, kind, instruction_set):
    check(CPU, several_tiles(kind, dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden", [1, 31, 40, 96])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_widths_that_fill_no_vector(dtype, hidden, kind):
    check(CPU, several_tiles(kind, dtype, hidden))


@pytest.mark.parametrize("tokens", [1, 7, 33, 128, 129, 1500])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_numbers_of_rows(tokens, dtype):
    """One row to several blocks of the backward too; a single one tells nothing about a spread of errors."""
    inputs = make(tokens, 32, 640, dtype=dtype, weights=False)
    inputs["labels"] = inputs["labels"].clamp_min(0)
    wide = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    got, gold = run(inputs, names=GRADIENTS[:3]), run(wide, names=GRADIENTS[:3])
    assert_as_accurate(got[0], Reference(lambda: token_loss_ref(**inputs)).baseline(), gold[0])
    for actual, truth in zip(got[1:], gold[1:], strict=True):
        assert (actual.double() - truth).norm() <= 2 * torch.finfo(dtype).eps * truth.norm() + 1e-5 * truth.norm()


@pytest.mark.quick
def test_float64_beside_float32_is_left_to_the_reference():
    inputs = several_tiles("kl")
    for name in ("lm_head", "ref_hidden_states"):
        mixed = inputs | {name: inputs[name].double()}
        leaf = mixed["hidden_states"].detach().requires_grad_()
        got, expected = (token_loss(**(mixed | {"hidden_states": leaf}), impl=impl) for impl in ("cpu", "ref"))
        assert got.dtype == expected.dtype and torch.equal(got, expected)
        assert torch.equal(*(torch.autograd.grad(loss.sum(), leaf)[0] for loss in (got, expected)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_any_number_of_threads(dtype, kind, threads):
    """The results are as accurate; the bits are those of a library's products, on which integers do not depend."""
    inputs = several_tiles(kind, dtype)
    check(CPU, inputs)
    check(CPU, inputs | {"labels": inputs["labels"].clone().index_fill_(0, torch.arange(9, TOKENS), IGNORED)})


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_integer_valued_inputs_match_bitwise(dtype, instruction_set, threads):
    """One logit far above the others: the softmax is exactly one-hot, all gradients are sums of integers."""
    inputs, (dz, expected, h, head) = one_hot(200, 640, 640, dtype)
    upstream = integers(200, seed=3)
    loss, grad_hidden, grad_head = run(inputs, upstream, GRADIENTS[:2])
    dz = upstream[:, None] * dz
    assert torch.equal(loss, expected)
    assert torch.equal(grad_hidden, (dz @ head).to(dtype)) and torch.equal(grad_head, (dz.t() @ h).to(dtype))


@pytest.mark.quick
@pytest.mark.parametrize("limit", ["baseline", "avx2"])
def test_below_avx512_nothing_is_multiplied_in_pairs(limit):
    """The instruction that multiplies pairs of bfloat16 takes a denormal for 0; a product of float32 does not."""
    size, generator = 64, torch.Generator().manual_seed(0)
    hot, labels = (torch.randint(0, size, (40,), generator=generator) for _ in range(2))
    labels[::3] = hot[::3]
    h = (2.0**-127 * torch.nn.functional.one_hot(hot, size)).to(BF16)
    head = (2.0**127 * torch.eye(size)).to(BF16)
    try:
        if native.instruction_set(limit) != limit:
            pytest.skip(f"this CPU has no {limit}")
        loss = token_loss(h, head, labels, logit_scale=256.0, impl="cpu")
    finally:
        native.instruction_set("")
    assert torch.equal(loss, torch.where(hot == labels, 0.0, 256.0))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_confident_token_keeps_its_small_loss_and_gradient(dtype):
    """1 - p of 1e-8 or less is below the last place of p in float32."""
    inputs = {"lm_head": torch.eye(640, dtype=dtype), "labels": torch.arange(64)}
    logit = (25 + torch.arange(64) / 4).to(dtype)
    inputs["hidden_states"] = torch.zeros(64, 640, dtype=dtype)
    inputs["hidden_states"][torch.arange(64), torch.arange(64)] = logit
    loss, grad = run(inputs, names=("hidden_states",))
    rest = 639 * torch.exp(-logit.double())
    assert rest.max() < 1e-8
    # the loss is a difference of float32 numbers near 0: what is left of it is what log(1 + rest) keeps
    torch.testing.assert_close(loss.double(), torch.log1p(rest), rtol=1e-6, atol=0)
    target = grad[torch.arange(64), torch.arange(64)].double()
    torch.testing.assert_close(target, -rest / (1 + rest), rtol=max(1e-6, torch.finfo(dtype).eps), atol=0)


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_forward_without_gradients_is_as_accurate(kind, dtype):
    check(CPU, several_tiles(kind, dtype), gradients=())


@pytest.mark.quick
def test_the_default_implementation_on_the_cpu():
    assert native.load("cpu") == ""
    inputs = several_tiles("nll")
    assert torch.equal(token_loss(**inputs), token_loss(**inputs, impl="cpu"))


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["nll", "uce"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_second_backward_has_nothing_kept_and_leaves_the_first_gradient_alone(kind, dtype):
    inputs = several_tiles(kind, dtype)
    leaves = {k: inputs[k].detach().requires_grad_() for k in GRADIENTS if inputs.get(k) is not None}
    loss = token_loss(**(inputs | leaves), impl="cpu").sum()
    first = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    before = [g.clone() for g in first]
    second = torch.autograd.grad(loss, list(leaves.values()))
    for a, b, kept in zip(first, second, before, strict=True):
        assert torch.equal(a, kept)
        if dtype == F32:
            torch.testing.assert_close(a, b)
