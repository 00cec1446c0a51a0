"""A step sees through FSDP2: a head by itself, passes in between, weights in another precision."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import MixedPrecisionPolicy

from tests.support.forked_ranks import found_on
from tests.support.sharded_child import batches_of, model, shard, weights_of
from tests.support.steps import data, made_of, prepared, recipe

pytestmark = pytest.mark.slow

STEPS = 2
SGD = ("optimizer.name=sgd", "optimizer.momentum=0.9")
# recipe, and how the model is wrapped
BITWISE = {
    "margins of a head by itself": ("pdu", "head", ("retain.alpha=1", "dual.warmup_steps=0", "dual.retain_loss_eps=9")),
    "a reference's head by itself": ("undial", "head", ()),
    "references of a model that is whole": ("kl_min", "root", ()),
    "the levers": ("combined", "layers", ("mollm.kl_floor=0", "mollm.gradients=compact")),
}
POLICIES = {
    "float32": MixedPrecisionPolicy(),
    "bfloat16": MixedPrecisionPolicy(param_dtype=torch.bfloat16),
    "sums in float32": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
}
NARROW = [(policy, fused) for policy in POLICIES for fused in (True, False)]


def passed(made) -> None:
    """Make passes of the model that no step makes: they leave whole weights in place, and a graph nobody uses."""
    batch = data()[1][0]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        made(**inputs)
        made.model(**inputs)
    made(**inputs)


def trained(made, name, pairs_of, *, between=False, fused=True, steps=STEPS):
    """The weights after steps whose micro-batches are `pairs_of(i)`."""
    base, _, more = BITWISE.get(name, (name, "", ()))
    step, _, _ = prepared(made, recipe(base, *SGD, *more, lr=1e-2), fused=fused)
    for i in range(steps):
        if between:
            passed(made)
        made_of(step, pairs_of(i))
    if between:
        passed(made)
    return weights_of(step)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder where two ranks have left their weights, by case."""
    folder = tmp_path_factory.mktemp("wrappings")

    def act(rank):
        def own(i):
            return [batches_of(i, rank, 2)]

        for name, (_, how, _) in BITWISE.items():
            after = trained(shard(model(), how), name, own, between=True)
            save(after, rank, name)
        for policy, fused in NARROW:
            made = shard(model(), mp_policy=POLICIES[policy])
            save(trained(made, "npo", own, fused=fused, steps=1), rank, f"{policy} {fused}")

    def save(after, rank, name):
        if rank == 0:
            save_file(after, folder / f"{name}.safetensors")

    found_on(2, folder, act)
    return folder


@pytest.mark.parametrize("name", BITWISE)
def test_passes_between_the_steps_change_nothing(name, ranks):
    """And two ranks have the bits of one process in which there were none."""
    ours = load_file(ranks / f"{name}.safetensors")
    expected = trained(model(), name, lambda i: [batches_of(i, rank, 2) for rank in range(2)])
    start = dict(model().named_parameters())
    assert any(not torch.equal(value, start[key]) for key, value in expected.items())
    assert [key for key, value in expected.items() if not torch.equal(ours[key], value)] == []


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "float32"])
def test_weights_in_bfloat16_train_their_float32_masters(policy, ranks):
    """As FSDP2 and autograd do, but for the rounding of gradients that FSDP2 keeps in bfloat16."""
    start = {key: p.detach() for key, p in model().named_parameters()}
    wide, ours, plain = (
        load_file(ranks / f"{name}.safetensors") for name in ("float32 True", f"{policy} True", f"{policy} False")
    )
    for key, before in start.items():
        change, apart = plain[key] - before, ours[key] - plain[key]
        assert ours[key].dtype == torch.float32 and change.any()
        assert apart.norm() <= 2**-6 * change.norm(), key
        assert not torch.equal(ours[key], wide[key]), key
