"""token_loss in C++: several tiles and blocks, every dtype and option, any number of threads."""

import pytest
import torch

from moe_unlearn import native
from moe_unlearn.ops.token_loss import IGNORED, KINDS
from moe_unlearn.testing import LAYOUTS, assert_as_accurate, integers, poison
from moe_unlearn.testing.yardstick import Reference
from tests.ops.test_token_loss import GRADIENTS, HEAD_OPTIONS, check, make
from tests.support.by_keyword import token_loss, token_loss_ref

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# tokens: three forward blocks; vocabulary: three forward tiles and six of the backward, the last ones odd
TOKENS, HIDDEN, VOCABULARY = 300, 64, 1301


def several_tiles(kind, dtype=F32, hidden=HIDDEN, **options):
    return make(TOKENS, hidden, VOCABULARY, kind=kind, dtype=dtype, **options)


def run(inputs, upstream=None, names=GRADIENTS, **options):
    """Loss and gradients of the inputs named."""
    leaves = {k: inputs[k].detach().requires_grad_() for k in names if inputs.get(k) is not None}
    loss = token_loss(**(inputs | leaves), impl="cpu", **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream
    return (loss, *torch.autograd.grad(loss, list(leaves.values()), upstream))


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_several_tiles(dtype, kind):
    with poison():
        check(several_tiles(kind, dtype), "cpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_every_instruction_set(dtype, kind, instruction_set):
    check(several_tiles(kind, dtype), "cpu")


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", HEAD_OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_scale_and_softcap(dtype, options, kind):
    check(several_tiles(kind, dtype) | options, "cpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden", [1, 31, 40, 96])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_widths_that_fill_no_vector(dtype, hidden, kind):
    check(several_tiles(kind, dtype, hidden), "cpu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["nll", "kl"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_memory_layouts(dtype, kind, layout):
    check(several_tiles(kind, dtype), "cpu", layout=layout)


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
@pytest.mark.parametrize("mixed", [{"lm_head": BF16}, {"hidden_states": BF16}, {"bias": F16}, {"bias": F64}], ids=str)
def test_mixed_dtypes(mixed):
    inputs = several_tiles("nll")
    check(inputs | {name: inputs[name].to(dtype) for name, dtype in mixed.items()}, "cpu")


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
    check(inputs, "cpu")
    check(inputs | {"labels": inputs["labels"].clone().index_fill_(0, torch.arange(9, TOKENS), IGNORED)}, "cpu")


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_integer_valued_inputs_match_bitwise(dtype, instruction_set, threads):
    """One logit far above the others: the softmax is exactly one-hot, all gradients are sums of integers."""
    size, tokens = 640, 200
    head = (64 * torch.eye(size)).to(dtype)
    generator = torch.Generator().manual_seed(0)
    hot, labels = (torch.randint(0, size, (tokens,), generator=generator) for _ in range(2))
    labels[::3] = hot[::3]
    h = (4 * torch.nn.functional.one_hot(hot, size)).to(dtype)
    upstream = integers(tokens, seed=3)
    inputs = {"hidden_states": h, "lm_head": head, "labels": labels}
    loss, grad_hidden, grad_head = run(inputs, upstream, GRADIENTS[:2])
    dz = upstream[:, None] * (h.float() / 4 - torch.nn.functional.one_hot(labels, size))
    assert torch.equal(loss.detach(), torch.where(hot == labels, 0.0, 256.0))
    assert torch.equal(grad_hidden, (dz @ head.float()).to(dtype))
    assert torch.equal(grad_head, (dz.t() @ h.float()).to(dtype))


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
@pytest.mark.parametrize("kind", KINDS)
def test_dropped_rows_may_hold_anything(kind, dtype):
    inputs = several_tiles(kind, dtype)
    dropped = (inputs["labels"] == IGNORED) | (inputs["token_weights"] == 0)
    dirty = {k: v.clone() if torch.is_tensor(v) else v for k, v in inputs.items()}
    dirty["hidden_states"][dropped] = torch.nan
    if kind == "kl":
        dirty["ref_hidden_states"][dropped] = torch.inf
    clean, got = run(inputs, names=GRADIENTS[:3]), run(dirty, names=GRADIENTS[:3])
    assert all(torch.equal(a, b) for a, b in zip(clean, got, strict=True))
    assert not got[1][dropped].any()


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_kl_to_itself_is_exactly_zero(dtype):
    inputs = several_tiles("kl", dtype)
    inputs["ref_hidden_states"] = inputs["hidden_states"].clone()
    assert not any(t.any() for t in run(inputs))


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
def test_nan_and_infinity_are_shown(kind, dtype):
    inputs = several_tiles(kind, dtype, weights=False)
    inputs["labels"][:4] = torch.tensor([5, 6, 7, 8])
    inputs["hidden_states"][0, 3], inputs["hidden_states"][1, 3] = torch.nan, torch.inf
    loss, grad = run(inputs, names=("hidden_states",))
    assert loss[:2].isnan().all() and loss[2:].isfinite().all()
    assert grad[:2].isnan().all() and grad[2:].isfinite().all()


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sign", [1, -1])
def test_logits_of_ten_thousand_that_rise_or_fall_from_tile_to_tile(kind, sign):
    inputs = several_tiles(kind)
    inputs["bias"] = sign * 20 * torch.arange(VOCABULARY).float()
    check(inputs, "cpu", gradients=("hidden_states", "lm_head"))
    assert token_loss(**inputs, impl="cpu").isfinite().all()


@pytest.mark.quick
def test_an_entry_of_minus_infinity_has_no_share():
    inputs = several_tiles("nll")
    inputs["bias"][:600] = -torch.inf  # the whole first tile
    inputs["labels"] = torch.where(inputs["labels"] == IGNORED, IGNORED, 600 + inputs["labels"] % 700)
    got = run(inputs, names=GRADIENTS[:2])
    rest = inputs | {"lm_head": inputs["lm_head"][600:], "bias": inputs["bias"][600:]}
    rest["labels"] = torch.where(inputs["labels"] == IGNORED, IGNORED, inputs["labels"] - 600)
    expected = run(rest, names=GRADIENTS[:2])
    torch.testing.assert_close(got[:2], expected[:2])
    torch.testing.assert_close(got[2][600:], expected[2])
    assert not got[2][:600].any()


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_forward_without_gradients_is_as_accurate(kind, dtype):
    check(several_tiles(kind, dtype), "cpu", gradients=())


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
