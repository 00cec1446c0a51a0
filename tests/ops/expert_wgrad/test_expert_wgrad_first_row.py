"""first_row: the update of an epilogue is rounded with the random bits of its rows in the whole weight."""

import pytest
import torch

from moe_unlearn.ops import SGD, AdamW, Update, masked_adamw_, masked_sgd_
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.ops.expert_wgrad import expert_wgrad_adamw_, expert_wgrad_sgd_
from moe_unlearn.testing import in_layout, poison
from tests.ops.expert_wgrad.cases import BF16, SHAPE, E, factors, gold, on_device
from tests.support.covers import cover
from tests.support.impls import impls

#: the epilogue, the update of dW it has to equal, and how many states they have
RULES = {
    "sgd": (expert_wgrad_sgd_, masked_sgd_, SGD(lr=0.02, momentum=0.9), 1),
    "adamw": (expert_wgrad_adamw_, masked_adamw_, AdamW(lr=0.02), 2),
}


@pytest.mark.quick
@cover(
    indirect=["impl"],
    impl=impls("expert_wgrad"),
    rule=tuple(RULES),
    layout=("contiguous", "transposed"),
    masked=(False, True),
    listed=(False, True),
    first_row=(2, 2**22),
)
def test_an_epilogue_rounds_as_masked_update(first_row, listed, masked, layout, rule, impl):
    """2^22 experts of 40 x 72 weights have counters beyond 2^32. The weight gradients are exact integers."""
    experts = torch.tensor([3, 1]) if listed else None
    made, inner = factors(exact=True), (2 if listed else E, *SHAPE)
    epilogue, update_, numbers, states = RULES[rule]
    update = Update(3, "stochastic", seed=-5, parameter_id=1 << 33, first_row=first_row)
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(E, *SHAPE, generator=generator).to(BF16)
    state = [torch.rand(inner, generator=generator) for _ in range(states)]
    mask = pack_bits(torch.rand(inner, generator=generator) < 0.7) if masked else None
    expected = [t.clone() for t in (param, *state)]
    update_(
        *expected[:1], gold(made, experts).float(), *expected[1:], mask, numbers, update, slices=experts, impl="ref"
    )

    own, state, mask, experts = impl.moved((param, state, mask, experts))
    own = in_layout(own, layout)
    with poison():
        epilogue(own, *state, on_device(impl, made), numbers, update, experts=experts, mask=mask, impl=impl.name)
    assert all(torch.equal(a.cpu(), b) for a, b in zip((own, *state), expected, strict=True))
