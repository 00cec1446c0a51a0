"""Hidden states in float8: every entry, KL and its gradient are wrong by no more than the format says."""

import math

import pytest
import torch

from moe_unlearn.config import Recipe
from moe_unlearn.plan.known import cache_bytes
from moe_unlearn.prepare import float8
from moe_unlearn.step import UnlearnStep
from tests.support.batches import random_batches
from tests.support.models import tiny_olmoe

pytestmark = pytest.mark.quick

VOCAB = 40
FLOAT32 = 1 + 2**-20  # some roundings of float32, in the scale and in two products


def allowed(states):
    """Return what each entry may be wrong by, from the format alone."""
    scale = states.abs().amax(-1, keepdim=True) / 448
    return FLOAT32 * torch.maximum(states.abs() * 2**-4, scale * 2**-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_entry_is_wrong_by_the_format_alone(dtype):
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-14, 9, (64, 96), generator=generator).double()
    states = (torch.randn(64, 96, generator=generator).double() * exponents.exp2()).to(dtype)
    states[3], states[4, 1:] = 0, 0
    states[5] *= 1e-30
    got = float8.unpacked(float8.packed(states)).double()
    assert float8.packed(states).shape == (64, 100) and float8.form(96, "float8") == (torch.uint8, 100)
    error = (got - states.double()).abs()
    assert (error <= allowed(states.double())).all() and not got[3].any()
    assert (error > allowed(states.double()) * 0.9).any(), "the bound is what it comes to"


def test_numbers_of_the_format_come_back_and_one_that_is_none_is_seen():
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()]
    for exponent in (-90, 0, 60):
        states = (numbers * 2.0**exponent).view(2, 127)
        assert torch.equal(float8.unpacked(float8.packed(states)), states)
    broken = torch.ones(3, 4)
    broken[0, 1], broken[1, 2] = torch.inf, torch.nan
    assert float8.unpacked(float8.packed(broken)).isnan().any(1).tolist() == [True, True, False]
    plain = torch.ones(2, 3, dtype=torch.bfloat16)
    assert float8.unpacked(plain) is plain


@pytest.mark.parametrize("moved", [0.0, 0.02, 1.0])
def test_kl_and_its_gradient_are_wrong_by_what_the_format_allows(moved):
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(50, 64, generator=generator).double()
    head = torch.randn(300, 64, generator=generator).double() / 64
    logits = (states + moved * torch.randn(50, 64, generator=generator)) @ head.T

    def kl(reference):
        own = logits.clone().requires_grad_()
        p = (reference @ head.T).log_softmax(-1)
        value = (p.exp() * (p - own.log_softmax(-1))).sum(-1)
        return value.detach(), torch.autograd.grad(value.sum(), own)[0]

    (exact, gradient), (value, its) = kl(states), kl(float8.unpacked(float8.packed(states)).double())
    largest = (allowed(states) @ head.abs().T).amax(-1)
    growth = (2 * largest).expm1()
    assert ((value - exact).abs() <= (exact + 2 / math.e) * growth).all()
    assert ((its - gradient).abs().sum(-1) <= growth).all()
    assert (value != exact).any() and growth.max() < 10


@pytest.mark.parametrize("recipe", ["kl_min", "undial", "mollm"])
def test_a_step_with_them_is_near_that_with_bfloat16_at_half_the_bytes(recipe, tmp_path):
    forget, retain = random_batches(VOCAB, seed=1), random_batches(VOCAB, seed=2)
    found, sizes = [], []
    for dtype in ("bfloat16", "float8"):
        torch.manual_seed(0)
        step = UnlearnStep(tiny_olmoe(VOCAB), Recipe.load(recipe, [f"reference_dtype={dtype}", "optimizer.lr=0.01"]))
        planned = cache_bytes(step.view(), step.prepared, forget, retain, stored=False).held
        step.prepare(forget, retain)
        taken = sum(cache.nbytes for cache in step.prepared.caches().values())
        assert planned == taken and f"{taken // tokens(step, forget, retain)} bytes a token" in str(step.plan())
        sizes.append(taken / tokens(step, forget, retain))
        found.append(step(forget[0], retain[0]))
        again = UnlearnStep(tiny_olmoe(VOCAB), step.recipe)
        again.load_state_dict(step.state_dict())
        assert again.prepared.caches()
    assert sizes[1] == sizes[0] / 2 + 4
    (plain, packed) = ({k: v for k, v in each.items() if k.endswith("_loss")} for each in found)
    assert packed == pytest.approx(plain, rel=0.05, abs=0.01) and packed != plain


def tokens(step, forget, retain):
    rows = forget if step.prepared.ref_hidden_states is None else retain
    return sum(int(batch["attention_mask"].sum()) for batch in rows)
