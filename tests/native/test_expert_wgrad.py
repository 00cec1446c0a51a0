"""expert_wgrad in C++: several blocks with ragged ends, on every instruction set and any number of threads."""

import pytest
import torch

from moe_unlearn import native
from moe_unlearn.ops import AdamW, Update, expert_wgrad_ref
from moe_unlearn.ops.expert_wgrad import expert_wgrad_adamw_, expert_wgrad_inner
from moe_unlearn.testing import assert_as_accurate
from moe_unlearn.testing.yardstick import Reference
from tests.ops.expert_wgrad.cases import BF16, F16, F32, E, check_update, factors, gold, keep, store, words_of
from tests.support.impls import CPU

pytestmark = pytest.mark.quick
BLOCKS = (250, 1100)  # M and P: several blocks an expert, the last ones ragged


@pytest.mark.parametrize(
    "dtypes", [(F32, F32), (BF16, BF16), (BF16, F32), (F32, BF16), (F16, F16), (F16, BF16)], ids=str
)
@pytest.mark.slow(but=2)
def test_store_accuracy(dtypes, instruction_set):
    dtype, out_dtype = dtypes
    made = factors(BLOCKS, dtype, tokens=200)
    baseline = Reference(lambda: expert_wgrad_ref(*made, None, None, out_dtype)).baseline()
    assert_as_accurate(store(CPU, made, out_dtype=out_dtype), baseline, gold(made))


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16)], ids=str)
def test_masked_store_and_accumulate_round_once(dtypes, instruction_set):
    dtype, out_dtype = dtypes
    made, kept = factors(BLOCKS, dtype), keep(E, *BLOCKS)
    dw = store(CPU, made, out_dtype=F32)
    got, whole = (store(CPU, made, mask=mask, out_dtype=out_dtype) for mask in (words_of(kept), None))
    assert torch.equal(got, torch.where(kept, whole, 0))
    out = torch.randn(dw.shape).to(out_dtype)
    expected = torch.where(kept, (out.float() + dw).to(out_dtype), out)
    assert torch.equal(store(CPU, made, out=out, mask=words_of(kept)), expected)


@pytest.mark.parametrize("numerics", ["fp32", "bf16", "bf16 fp32 state stochastic"])
def test_update_in_several_blocks_for_every_instruction_set(numerics, instruction_set):
    made = factors(BLOCKS, F32 if numerics == "fp32" else BF16)
    check_update(CPU, "adamw decay", numerics, made)
    check_update(CPU, "sgd dampening", numerics, made, experts=None)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_inner_products_are_exact_on_integers(dtype):
    made = [factors(BLOCKS, dtype, exact=True, seed=i) for i in range(3)]
    kept = keep(E, *BLOCKS)
    dw = torch.stack([torch.where(kept, gold(one), 0).flatten(1) for one in made], 1)
    assert torch.equal(expert_wgrad_inner(made, mask=words_of(kept), impl="cpu"), dw @ dw.mT)


def everything(dtype, exact=False):
    """Return what each kernel makes of the same factors."""
    made = factors(BLOCKS, dtype, "sentinels", tokens=500, exact=exact)
    weight, state = torch.ones(E, *BLOCKS, dtype=dtype), [torch.zeros(3, *BLOCKS, dtype=dtype) for _ in range(2)]
    experts = torch.tensor([3, 1, 2])
    expert_wgrad_adamw_(weight, *state, made, AdamW(lr=0.1), Update(step=1), experts=experts, impl="cpu")
    stored = store(CPU, made), store(CPU, made, out=torch.ones(E, *BLOCKS))
    return *stored, weight, *state, expert_wgrad_inner([made, made], impl="cpu")


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_any_number_of_threads(dtype, threads):
    """Ours share the work out alike; what is left is the order of a library's sums, which integers do not show."""
    made = factors(BLOCKS, dtype, "sentinels", tokens=500)
    baseline = Reference(lambda: expert_wgrad_ref(*made)).baseline()
    assert_as_accurate(store(CPU, made), baseline, gold(made))
    several = everything(dtype, exact=True)
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) and a.any() for a, b in zip(several, everything(dtype, exact=True), strict=True))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_instruction_sets_give_the_same_bits(dtype):
    native.narrow_products("torch")  # the baseline has no other
    best = everything(dtype)
    for name in native.INSTRUCTION_SETS:
        native.instruction_set(name)
        assert all(torch.equal(a, b) for a, b in zip(best, everything(dtype), strict=True))
    native.instruction_set("")
    native.narrow_products("")
