"""token_loss in Triton with descriptors (sm_90) and without (sm_80), in the tiles that ship, and alone in each row.

What the kernels compute is tested in tests/ops/token_loss, with descriptors and tiles as small as here.
"""

import itertools

import pytest
import torch
import triton
import triton.language as tl

from moe_unlearn.ops.token_loss import KINDS
from moe_unlearn.testing import integers, ulp
from moe_unlearn.triton_kernels import configs
from moe_unlearn.triton_kernels.token_loss_logits import _tanh, expm1, log1p
from tests.ops.token_loss.cases import BF16, F16, F32, GRADIENTS, check, inputs_of, loss_and_gradients, make, one_hot
from tests.support.by_keyword import token_loss
from tests.support.impls import TRITON
from tests.triton_kernels import tiles

# float32 has no descriptors: its kernels are the same everywhere
VARIANTS = [(80, BF16), (90, F16), (90, F32)]
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NaN and infinity are meant


@pytest.fixture
def small(monkeypatch):
    """Choose the architecture and make every tile small."""
    return lambda arch: tiles.token_loss(monkeypatch, arch)


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients_by_pointers(small, kind):
    small(80)
    check(TRITON, inputs_of(TRITON, kind, BF16))
    if kind == "kl":
        check(TRITON, inputs_of(TRITON, kind, BF16) | {"ref_lm_head": inputs_of(TRITON, dtype=BF16, seed=9)["lm_head"]})


@pytest.mark.quick
# float32 has one tile for all kinds
@pytest.mark.parametrize("arch, dtype, kind", [(90, F32, "nll"), *itertools.product((80, 90), (BF16,), KINDS)], ids=str)
@pytest.mark.slow(but=1)
def test_shipped_tiles(monkeypatch, arch, dtype, kind):
    monkeypatch.setenv("MOE_UNLEARN_TRITON_ARCH", str(arch))
    # more rows than a tile has, and more columns
    check(TRITON, TRITON.moved(make(230, 72, 270, kind=kind, dtype=dtype)))


def test_softcap_in_bf16_by_descriptor(small):
    small(90)
    check(TRITON, inputs_of(TRITON, "kl", BF16) | {"logit_softcap": 2.0})


def test_float64_of_the_head_is_refused():
    inputs = inputs_of(TRITON)
    with pytest.raises(TypeError, match="no float64"):
        token_loss(**inputs | {"lm_head": inputs["lm_head"].double()}, impl="triton")


@pytest.mark.quick
@pytest.mark.parametrize("arch, dtype", VARIANTS, ids=str)
@pytest.mark.slow(but=1)
def test_integer_valued_inputs_match_bitwise(small, arch, dtype):
    small(arch)
    inputs, (dz, expected, h, head) = one_hot(75, 48, 48, dtype)
    upstream = integers(75, seed=3)
    loss, grads = loss_and_gradients(TRITON, TRITON.moved(inputs), GRADIENTS[:2], TRITON.moved(upstream))
    dz = upstream[:, None] * dz
    assert torch.equal(loss.cpu(), expected)
    assert torch.equal(grads[0].cpu().float(), dz @ head) and torch.equal(grads[1].cpu().float(), dz.t() @ h)


@pytest.mark.parametrize("label", [70, -1, 10**12])
@pytest.mark.parametrize("kind", ["nll", "uce"])
def test_a_label_outside_the_vocabulary_is_shown_as_nan(small, kind, label):
    """Raising would wait for the device; the row is NaN, its neighbours are not."""
    small(90)
    inputs = inputs_of(TRITON, kind, weights=False)
    inputs["labels"][20] = label
    loss, (grad,) = loss_and_gradients(TRITON, inputs, GRADIENTS[:1])
    others = torch.arange(len(loss), device=loss.device) != 20
    assert loss[20].isnan() and grad[20].isnan().all()
    assert loss[others].isfinite().all() and grad[others].isfinite().all()


@pytest.mark.parametrize("kind", ["nll", "kl"])
def test_one_row_has_the_same_loss_in_any_company(small, kind):
    """With one run of the vocabulary the sums of a row do not depend on the others."""
    small(90)
    inputs = inputs_of(TRITON, kind, BF16)
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
        assert ((out.cpu() - truth).abs() <= 4 * ulp(truth, F32)).all()  # what their docstrings say


def test_tiles_fit_together_and_the_workspace_is_bounded():
    for rows, dtype, arch, two, long, aligned in itertools.product(
        (1, 64, 65, 8192, 2**17), (BF16, F32), configs.ARCHITECTURES, *[(False, True)] * 3
    ):
        config = configs.token_loss(rows, 151_936, dtype, arch, two, long, aligned)
        assert config.chunk % config.logits.columns == 0 and config.logits.columns % config.grad_hidden.depth == 0
        # the zeros behind the rows that count reach to the end of a tile of logits
        assert config.logits.rows % config.grad_head.depth == 0
        # dl/dz takes half a gigabyte, or 1024 columns
        assert config.chunk * rows * dtype.itemsize <= max(2**29, 1024 * rows * dtype.itemsize)
        splits = -(-151_936 // config.logits.columns) / config.tiles_per_split
        assert 20 * splits * rows <= max(2**27, 20 * 600 * rows / config.tiles_per_split)


def test_what_is_kept_of_logits_fits_in_300_mb():
    sizes = (1, 64, 65, 1000, 8192, 2**17), (97, 50_304, 151_936)
    for rows, vocabulary, dtype, arch, two, long in itertools.product(
        *sizes, (BF16, F32), configs.ARCHITECTURES, (False, True), (False, True)
    ):
        config = configs.token_loss(rows, vocabulary, dtype, arch, two, long, True, True)
        tile = config.logits
        columns = (1 + two) * -(-vocabulary // tile.columns) * tile.columns
        assert config.kept_rows * columns * dtype.itemsize <= configs.KEPT_BYTES == 300 * 2**20
        # a run of rows is whole tiles of both products, and long enough not to wait for the head
        assert config.kept_rows % tile.rows == 0 == config.kept_rows % config.grad_hidden.rows
        assert config.kept_rows >= min(rows, 448 // (1 + two)) and tile.columns % config.slices == 0
