"""token_loss in Triton against the reference, with descriptors (sm_90) and without (sm_80).

Most tests run with tiles so small that a few dozen rows cross every boundary: row tiles, splits of the vocabulary,
chunks of dl/dz, splits of the gradient of the hidden states. `test_shipped_tiles` runs those of `configs`.
"""

import itertools

import pytest
import torch
import triton
import triton.language as tl

from moe_unlearn.ops.token_loss import IGNORED, KINDS
from moe_unlearn.testing import LAYOUTS, integers, poison, ulp
from moe_unlearn.triton_kernels import configs
from moe_unlearn.triton_kernels.token_loss_logits import _tanh, expm1, log1p
from tests.ops import test_token_loss as reference
from tests.ops.test_token_loss import GRADIENTS, HEAD_OPTIONS
from tests.support.by_keyword import token_loss

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# float32 has no descriptors: its kernels are the same everywhere
TOKENS = 64  # of which more than 32 count: two row tiles; larger shapes take the interpreter minutes
VARIANTS = [(90, BF16), (80, BF16), (90, FP16), (90, FP32)]
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NaN and infinity are meant


@pytest.fixture
def shipped(monkeypatch):
    """Choose the architecture, keep the tiles."""
    return lambda arch: monkeypatch.setenv("MOE_UNLEARN_TRITON_ARCH", str(arch))


@pytest.fixture
def small(monkeypatch, shipped):
    """Choose the architecture and make every tile small."""
    choose = configs.token_loss

    def tiny(*arguments):
        config = choose(*arguments)

        def shrink(tile, rows, columns):
            return tile._replace(rows=rows, columns=columns, depth=16, group=2)

        return config._replace(
            logits=shrink(config.logits, 32, 32),
            grad_hidden=shrink(config.grad_hidden, 32, 16),
            grad_head=shrink(config.grad_head, 16, 32),
            tiles_per_split=2,
            chunk=64,
            split_tiles=12,
            splits=2,
            merge_rows=16,
            merge_splits=2,
        )

    monkeypatch.setattr(configs, "token_loss", tiny)
    return shipped


def make(device, tokens=TOKENS, hidden=24, vocabulary=70, **options):
    """The reference's inputs: 24 columns, so that rows of bfloat16 are 16-byte aligned."""
    return on(device, reference.make(tokens, hidden, vocabulary, **options))


def on(device, inputs):
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in inputs.items()}


def loss_and_gradients(inputs, names, upstream, impl="triton"):
    leaves = {k: v.detach().clone().requires_grad_() if k in names else v for k, v in inputs.items()}
    loss = token_loss(**leaves, impl=impl)
    return loss.detach(), torch.autograd.grad(loss, [leaves[k] for k in names], upstream.to(loss.device))


def uneven(tokens=TOKENS):
    return torch.linspace(-1.3, 0.9, tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch, dtype", VARIANTS, ids=str)
def test_value_and_gradients(device, small, arch, dtype, kind):
    small(arch)
    reference.check(make(device, kind=kind, dtype=dtype), "triton")


@pytest.mark.quick
# float32 has one tile for all kinds
@pytest.mark.parametrize(
    "arch, dtype, kind", [(90, FP32, "nll"), *itertools.product((80, 90), (BF16,), KINDS)], ids=str
)
@pytest.mark.slow
def test_shipped_tiles(device, shipped, arch, dtype, kind):
    shipped(arch)
    # more rows than a tile has, and more columns
    reference.check(make(device, 230, 72, 270, kind=kind, dtype=dtype), "triton")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", HEAD_OPTIONS, ids=str)
def test_scale_and_softcap(device, small, options, kind):
    small(90)
    reference.check(make(device, kind=kind) | options, "triton")


@pytest.mark.parametrize("options", HEAD_OPTIONS[1:2], ids=str)
def test_softcap_in_bf16_by_descriptor(device, small, options):
    small(90)
    reference.check(make(device, kind="kl", dtype=BF16) | options, "triton")


# uce reads the labels, kl a second matrix of hidden states
@pytest.mark.parametrize("kind, layout", [("uce", "offset"), ("uce", "strided"), *(("kl", name) for name in LAYOUTS)])
def test_memory_layouts(device, small, kind, layout):
    """Inputs and upstream; a head that no descriptor can name is read by pointers."""
    small(90)
    reference.check(make(device, kind=kind, dtype=BF16), "triton", layout=layout)


@pytest.mark.parametrize("arch, dtype", [(90, BF16), (80, BF16)], ids=str)
def test_a_head_of_its_own_for_the_reference(device, small, arch, dtype):
    small(arch)
    other = make(device, kind="nll", dtype=dtype, seed=9)["lm_head"]
    reference.check(make(device, kind="kl", dtype=dtype) | {"ref_lm_head": other}, "triton")


def test_expanded_hidden_states_and_upstream(device, small):
    small(90)
    inputs = make(device) | {"hidden_states": torch.ones(1, 24, device=device).expand(TOKENS, 24)}
    names, upstream = GRADIENTS[1:3], torch.tensor(0.7).expand(TOKENS)
    _, expanded = loss_and_gradients(inputs, names, upstream)
    _, plain = loss_and_gradients(
        inputs | {"hidden_states": torch.ones(TOKENS, 24, device=device)}, names, upstream.clone()
    )
    assert all(torch.equal(a, b) for a, b in zip(expanded, plain, strict=True))


def test_mixed_dtypes_are_multiplied_in_float32(device, small):
    small(90)
    inputs = make(device)
    for name, dtype in {"lm_head": BF16, "bias": FP16, "token_weights": torch.float64}.items():
        inputs[name] = inputs[name].to(dtype)
    same = {k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    loss, grads = loss_and_gradients(inputs, GRADIENTS[:3], uneven())
    expected, expected_grads = loss_and_gradients(same, GRADIENTS[:3], uneven())
    assert torch.equal(loss, expected)
    for name, a, b in zip(GRADIENTS, grads, expected_grads, strict=False):
        assert a.dtype == inputs[name].dtype and torch.equal(a, b.to(a.dtype))


def test_float64_of_the_head_is_refused(device):
    inputs = make(device)
    with pytest.raises(TypeError, match="no float64"):
        token_loss(**inputs | {"lm_head": inputs["lm_head"].double()}, impl="triton")


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_dropped_rows_are_exactly_zero_whatever_they_hold(device, small, kind):
    small(90)
    inputs, upstream = make(device, kind=kind, dtype=BF16), uneven().to(device)
    dropped = (inputs["labels"] == IGNORED) | (inputs["token_weights"] == 0)
    dirty = {k: v.clone() if torch.is_tensor(v) else v for k, v in inputs.items()}
    dirty["hidden_states"][dropped] = torch.nan
    dirty["token_weights"][inputs["labels"] == IGNORED] = torch.nan
    if kind == "kl":
        dirty["ref_hidden_states"][dropped] = torch.inf
    else:
        dirty["labels"][dropped & (inputs["labels"] != IGNORED)] = 10**9
    names = GRADIENTS[:3]
    with poison():
        clean_loss, clean = loss_and_gradients(inputs, names, upstream)
        loss, grads = loss_and_gradients(dirty, names, torch.where(dropped, torch.nan, upstream))
    assert torch.equal(loss, clean_loss) and not loss[dropped].any() and loss[~dropped].all()
    assert all(torch.equal(a, b) for a, b in zip(grads, clean, strict=True))
    assert not grads[0][dropped].any()


def test_few_rows_of_many_count(device, small):
    """Five of 64: most programs have nothing to do, and the sums are split."""
    small(90)
    inputs = make(device, dtype=BF16, weights=False)
    inputs["labels"][:] = IGNORED
    inputs["labels"][[3, 31, 32, 40, 63]] = torch.arange(5, device=device) + 60
    reference.check(inputs, "triton", gradients=GRADIENTS[:3])


def test_weights_that_need_a_gradient_keep_their_zero_rows(device, small):
    small(90)
    inputs = make(device)
    weights = inputs["token_weights"].requires_grad_()
    token_loss(**inputs, impl="triton").sum().backward()
    assert torch.equal(weights.grad, token_loss(**inputs | {"token_weights": None}, impl="triton"))
    assert weights.grad[(weights == 0) & (inputs["labels"] != IGNORED)].all()


@pytest.mark.parametrize("needed", [(name,) for name in GRADIENTS[:3]], ids=str)
def test_only_the_gradients_needed(device, small, needed):
    small(90)
    inputs = make(device, dtype=BF16)
    _, everything = loss_and_gradients(inputs, GRADIENTS[:3], uneven())
    _, some = loss_and_gradients(inputs, needed, uneven())
    expected = dict(zip(GRADIENTS, everything, strict=False))
    assert all(torch.equal(grad, expected[name]) for name, grad in zip(needed, some, strict=True))


@pytest.mark.quick
@pytest.mark.parametrize("sizes", [(75, 48, 48), (1, 8, 1), (1, 7, 5), (40, 16, 65)], ids=str)
@pytest.mark.parametrize("arch, dtype", VARIANTS, ids=str)
@pytest.mark.slow(but=3)
def test_integer_valued_inputs_match_bitwise(device, small, arch, dtype, sizes):
    """One logit dominates, so softmax is exactly one-hot and every gradient is a sum of integers."""
    small(arch)
    tokens, hidden, vocabulary = sizes
    generator = torch.Generator().manual_seed(0)
    h = 4 * torch.eye(hidden)[torch.randint(0, min(hidden, vocabulary), (tokens,), generator=generator)]
    labels, head, upstream = torch.arange(tokens) % vocabulary, 100 * torch.eye(vocabulary, hidden), integers(tokens)
    inputs = on(device, {"hidden_states": h.to(dtype), "lm_head": head.to(dtype), "labels": labels})
    loss, (grad_hidden, grad_head) = loss_and_gradients(inputs, GRADIENTS[:2], upstream)
    onehot = torch.nn.functional.one_hot
    dz = upstream[:, None] * (onehot(h.argmax(1), vocabulary) - onehot(labels, vocabulary))
    assert torch.equal(loss.cpu(), torch.where(h.argmax(1) == labels, 0.0, 400.0))
    assert torch.equal(grad_hidden.cpu().float(), dz @ head)
    assert torch.equal(grad_head.cpu().float(), dz.t() @ h)


@pytest.mark.quick
@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_no_row_that_counts(device, kind, tokens):
    inputs = make(device, tokens, 24, 97, kind=kind)
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORED)
    with poison():
        loss, grads = loss_and_gradients(inputs, GRADIENTS, torch.full((tokens,), torch.nan))
    assert loss.shape == (tokens,) and not loss.any()
    for grad, name in zip(grads, GRADIENTS, strict=True):
        assert grad.shape == inputs[name].shape and not grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_all_weights_zero(device, small, kind):
    small(90)
    inputs = make(device, kind=kind, dtype=BF16)
    inputs["token_weights"].zero_()
    with poison():
        loss, grads = loss_and_gradients(inputs, GRADIENTS[:3], uneven())
    assert not loss.any() and not any(grad.any() for grad in grads)


@pytest.mark.quick
@pytest.mark.parametrize("arch, dtype", VARIANTS, ids=str)
@pytest.mark.slow
def test_kl_to_itself_is_exactly_zero_and_its_gradient_too(device, small, arch, dtype):
    small(arch)
    inputs = make(device, kind="kl", dtype=dtype)
    inputs["ref_hidden_states"] = inputs["hidden_states"].clone()
    loss, grads = loss_and_gradients(inputs, GRADIENTS[:3], uneven())
    assert not loss.any() and not any(grad.any() for grad in grads)


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_a_row_of_nan_or_infinity_stays_alone(device, small, kind):
    small(90)
    inputs = make(device, kind=kind, dtype=BF16, weights=False)
    inputs["labels"][:4] = torch.tensor([5, 6, 7, 8])
    loss, (grad,) = loss_and_gradients(inputs, GRADIENTS[:1], uneven())
    inputs["hidden_states"][0, 3] = torch.nan
    inputs["hidden_states"][1, 3] = torch.inf
    dirty_loss, (dirty_grad,) = loss_and_gradients(inputs, GRADIENTS[:1], uneven())
    assert dirty_loss[:2].isnan().all() and dirty_grad[:2].isnan().all()
    assert torch.equal(dirty_loss[2:], loss[2:]) and torch.equal(dirty_grad[2:], grad[2:])


def test_a_logit_of_minus_infinity_has_probability_zero(device, small):
    small(90)
    inputs = make(device, kind="nll")
    inputs["bias"][:40] = -torch.inf  # the first tile and a part of the second
    inputs["labels"].clamp_(min=50)
    reference.check(inputs, "triton", gradients=GRADIENTS[:2])
    inputs = make(device, kind="kl")
    inputs["bias"][:40] = -torch.inf
    reference.check(inputs, "triton", gradients=GRADIENTS[:2])


@pytest.mark.parametrize("kind", KINDS)
def test_large_logits_do_not_overflow(device, small, kind):
    small(90)
    inputs = make(device, kind=kind)
    inputs["bias"] = inputs["bias"] * 1e4
    reference.check(inputs, "triton", gradients=("hidden_states", "lm_head"))


@pytest.mark.parametrize("label", [70, -1, 10**12])
@pytest.mark.parametrize("kind", ["nll", "uce"])
def test_a_label_outside_the_vocabulary_is_shown_as_nan(device, small, kind, label):
    """Raising would wait for the device; the row is NaN, its neighbours are not."""
    small(90)
    inputs = make(device, kind=kind, weights=False)
    inputs["labels"][20] = label
    loss, (grad,) = loss_and_gradients(inputs, GRADIENTS[:1], uneven())
    others = torch.arange(TOKENS, device=device) != 20
    assert loss[20].isnan() and grad[20].isnan().all()
    assert loss[others].isfinite().all() and grad[others].isfinite().all()


def test_labels_say_only_which_rows_count_in_kl(device, small):
    small(90)
    inputs = make(device, kind="kl")
    loss = token_loss(**inputs, impl="triton")
    inputs["labels"] = torch.where(inputs["labels"] == IGNORED, IGNORED, 10**9)
    assert torch.equal(token_loss(**inputs, impl="triton"), loss)


def test_compiles_as_one_graph(device, small):
    small(90)
    inputs = make(device, kind="kl", dtype=BF16)
    leaves = [inputs[k].requires_grad_() for k in GRADIENTS[:3]]

    def objective():
        return token_loss(**inputs, impl="triton").square().sum()

    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    eager = torch.autograd.grad(objective(), leaves)
    for a, b in zip(torch.autograd.grad(compiled(), leaves), eager, strict=True):
        assert torch.equal(a, b)


@pytest.mark.quick
@pytest.mark.slow
def test_the_same_bits_every_time(device, small):
    small(90)
    inputs = make(device, kind="kl", dtype=BF16)
    first = loss_and_gradients(inputs, GRADIENTS, uneven())
    with poison():
        second = loss_and_gradients(inputs, GRADIENTS, uneven())
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("kind", ["nll", "kl"])
def test_one_row_has_the_same_loss_in_any_company(device, small, kind):
    """With one run of the vocabulary the sums of a row do not depend on the others."""
    small(90)
    inputs = make(device, kind=kind, dtype=BF16)
    together = token_loss(**inputs, impl="triton")
    names = ("hidden_states", "labels", "token_weights", "ref_hidden_states")
    for row in (0, 5, 33, 63):
        alone = {k: v[row : row + 1] if k in names else v for k, v in inputs.items()}
        assert torch.equal(token_loss(**alone, impl="triton")[0], together[row])


@triton.jit
def _functions_kernel(x, tanh_out, log1p_out, expm1_out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    value = tl.load(x + at)
    tl.store(tanh_out + at, _tanh(value))
    tl.store(log1p_out + at, log1p(-tl.minimum(tl.abs(value), 0.5)))
    tl.store(expm1_out + at, expm1(tl.minimum(tl.abs(value), 1.0)))


def test_functions_are_accurate_near_zero_and_far(device):
    x = torch.cat([torch.logspace(-30, 2, 2047), torch.zeros(1)]) * torch.tensor([1.0, -1.0]).repeat(1024)
    outs = torch.empty(3, 2048, device=device)
    _functions_kernel[(1,)](x.to(device), *outs, 2048)
    for out, function, argument in (
        (outs[0], torch.tanh, x),
        (outs[1], torch.log1p, -x.abs().clamp_max(0.5)),
        (outs[2], torch.expm1, x.abs().clamp_max(1.0)),
    ):
        truth = function(argument.double())
        assert ((out.cpu() - truth).abs() <= 4 * ulp(truth, FP32)).all()  # what their docstrings say


def test_tiles_fit_together_and_the_workspace_is_bounded():
    for rows, dtype, arch, two, long, aligned in itertools.product(
        (1, 64, 65, 8192, 2**17), (BF16, FP32), configs.ARCHITECTURES, *[(False, True)] * 3
    ):
        config = configs.token_loss(rows, 151_936, dtype, arch, two, long, aligned)
        assert config.chunk % config.logits.columns == 0 and config.logits.columns % config.grad_hidden.depth == 0
        # the zeros behind the rows that count reach to the end of a tile of logits
        assert config.logits.rows % config.grad_head.depth == 0
        # dl/dz takes half a gigabyte, or 1024 columns
        assert config.chunk * rows * dtype.itemsize <= max(2**29, 1024 * rows * dtype.itemsize)
        splits = -(-151_936 // config.logits.columns) / config.tiles_per_split
        assert 20 * splits * rows <= max(2**27, 20 * 600 * rows / config.tiles_per_split)
