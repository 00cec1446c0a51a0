"""State that lies on the host: the same bits, each piece there and back once a step, and two buffers on the device.

On a CPU, whose memory is the host's, it is brought nowhere; here it is made to take a GPU's way.
"""

import collections
import copy
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from moe_unlearn import offload
from moe_unlearn.offload import Stage, _room
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.ops.expert_wgrad import Factors
from moe_unlearn.optim import MaskedAdamW, MaskedSGD
from moe_unlearn.plan.knobs import changed, knobs
from moe_unlearn.plan.known import held_at_rest
from moe_unlearn.step import UnlearnStep
from moe_unlearn.step.weights import TrainedWeights
from moe_unlearn.verify import VerificationError
from tests.support.models import tiny_olmoe
from tests.support.steps import VOCAB, data, prepared, recipe, weights

pytestmark = pytest.mark.quick
SHAPES = [(6, 8, 40), (6, 8, 40), (7, 64), (64,), ()]


class Copies:
    """Counts the bytes copied to and from the device by the host's memory, and how many pieces are there at once."""

    def __init__(self):
        self.there, self.back, self.made = collections.Counter(), collections.Counter(), []
        self.pieces, self.most = [], 0

    def copy(self, into, source):
        into.copy_(source)
        if isinstance(source, FakeTensor):  # in a plan, which counts by itself
            return
        buffers = {memory.untyped_storage().data_ptr() for memory in self.buffers()}
        counted, host = (self.back, into) if source.untyped_storage().data_ptr() in buffers else (self.there, source)
        counted[host.untyped_storage().data_ptr()] += host.nbytes
        self.most = max(self.most, sum(t.nbytes for t in self.buffers()))

    def buffers(self):
        made = [memory for made in self.made if (memory := made()) is not None]
        return [memory for memory in made if not isinstance(memory, FakeTensor)]


@pytest.fixture
def copies(monkeypatch):
    """The CPU takes the way of a device with a memory of its own, in pieces of 6,000 bytes."""
    counted, made, bring = Copies(), Stage._made, Stage.brought

    def noted(self, size):
        memory = made(self, size)
        counted.made.append(weakref.ref(memory))
        return memory

    def brought(self, held):
        counted.pieces.append([*held.values()])
        return bring(self, held)

    monkeypatch.setattr(Stage, "brought", brought)
    monkeypatch.setattr(offload, "is_apart", lambda device: True)
    monkeypatch.setattr(offload, "PIECE", 6000)
    monkeypatch.setattr(Stage, "_made", noted)
    monkeypatch.setattr(Stage, "_copy", staticmethod(counted.copy))
    return counted


def trained(kind, dtype, copies=None, *, offloaded=False, **options):
    """Parameters and optimizer after three updates, of gradients, compact gradients and factors, and a new mask."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    params = [torch.nn.Parameter(randn(*shape).to(dtype)) for shape in SHAPES]
    options = ({"momentum": 0.9} if kind is MaskedSGD else {}) | options
    optimizer = kind([{"params": params, "offload": offloaded}], lr=0.1, weight_decay=0.1, seed=3, **options)
    bits = torch.rand(6, 8, 40, generator=generator) < 0.5
    masks = []
    for frozen in (2, 4):
        bits[frozen] = False
        masks.append(pack_bits(bits))
    offsets = torch.tensor([0, 2, 2, 5, 6, 7, 9], dtype=torch.int32)
    for step in range(3):
        optimizer.set_masks({1: masks[step == 2]})
        for p in params[2:]:
            p.grad = randn(*p.shape).to(dtype)
        compact = randn(*params[1].shape)[optimizer.layout(params[1]).trained_slices].to(dtype)
        if copies is not None:
            copies.there.clear()
            copies.back.clear()
        optimizer.update_from(params[0], Factors(randn(9, 8).to(dtype), randn(9, 40).to(dtype), offsets))
        optimizer.step(gradients={params[1]: compact})
    return params, optimizer


@pytest.mark.parametrize("kind", [MaskedSGD, MaskedAdamW])
@pytest.mark.parametrize(
    "dtype, numerics, state",
    [
        (torch.float32, "parity", "float32"),
        (torch.float64, "parity", "float32"),
        (torch.bfloat16, "stochastic", "int8"),
        (torch.bfloat16, "fp32_master", "bfloat16"),
    ],
)
def test_state_on_the_host_has_the_same_bits(kind, dtype, numerics, state, copies):
    params, optimizer = trained(kind, dtype, copies, numerics=numerics, state=state, offloaded=True)
    plain, other = trained(kind, dtype, numerics=numerics, state=state)
    assert all(torch.equal(p, q) for p, q in zip(params, plain, strict=True))
    held = []
    for p, q in zip(params, plain, strict=True):
        assert optimizer.state[p].keys() == other.state[q].keys()
        assert all(torch.equal(v, other.state[q][k]) for k, v in optimizer.state[p].items())
        held += [v for k, v in optimizer.state[p].items() if k not in ("step", "slices")]
    # each goes there once and comes back once, through two buffers of the largest piece
    once = {v.untyped_storage().data_ptr(): v.nbytes for v in held}
    assert copies.there == copies.back == once and len(once) >= len(params)
    largest = max(sum(map(_room, piece)) for piece in copies.pieces)
    assert max(sum(t.nbytes for t in piece) for piece in copies.pieces) <= offload.PIECE
    assert 4 * largest < copies.most <= 2 * 4 * largest


@pytest.mark.parametrize("name, guard", [("wagle", "loss"), pytest.param("mollm", "strict", marks=pytest.mark.nightly)])
def test_steps_save_and_resume_with_the_key_switched(name, guard, copies):
    def made(offloaded, saved=None):
        torch.manual_seed(0)
        model = tiny_olmoe(vocab_size=VOCAB).eval()
        own = recipe(name, f"guard={guard}", "optimizer.name=adamw", f"optimizer.offload={offloaded}")
        if saved is None:
            return prepared(model, own)
        model.load_state_dict(saved[0])
        step = UnlearnStep(model, own)
        step.load_state_dict(saved[1])
        return step, *data()

    ends = []
    for first, then in [("false", "false"), ("false", "true"), ("true", "false")]:
        step, forget, retain = made(first)
        metrics = [step(forget[0], retain[0])]
        assert bool(copies.pieces) == (first == "true")
        saved = step.model.state_dict(), copy.deepcopy(step.state_dict())
        copies.pieces.clear()
        step, forget, retain = made(then, saved)
        metrics.append(step(forget[1], retain[1]))
        assert bool(copies.pieces) == (then == "true")
        copies.pieces.clear()
        ends.append((metrics, weights(step.model), step.state_dict()["optimizer"]["state"]))
        step.close()
    metrics, plain, state = ends[0]
    for other, ours, held in ends[1:]:
        assert other == metrics
        assert all(torch.equal(ours[key], plain[key]) for key in plain)
        assert all(torch.equal(v, state[i][k]) for i, values in held.items() for k, v in values.items())


@pytest.mark.parametrize("broken", [False, True])
def test_a_verified_step_has_its_state_on_the_host(broken, copies, monkeypatch):
    """Of what comes to the device verify sees each bit: a moment that is not what lies on the host ends the step."""
    own = recipe("graddiff", "guard=loss", "optimizer.name=adamw", "optimizer.offload=true", lr=1e-2)
    torch.manual_seed(0)
    step, forget, retain = prepared(tiny_olmoe(vocab_size=VOCAB).eval(), own, verify=True)
    step(forget[0], retain[0])
    assert copies.pieces and step.verifier.summary().startswith("step 1: equals the plain step")
    if not broken:
        step(forget[1], retain[1])
        assert all(report.largest < 1e-4 for report in step.verifier.reports) and len(step.verifier.reports) == 2
        return
    real, before = Stage._copy, weights(step.model)
    made = {memory().untyped_storage().data_ptr() for memory in copies.made if memory() is not None}

    def copy(into, source):
        real(into, source)
        if into.untyped_storage().data_ptr() in made and into.is_floating_point():
            into.mul_(1.5)

    monkeypatch.setattr(Stage, "_copy", staticmethod(copy))
    with pytest.raises(VerificationError, match="exp_avg|weight"):
        step(forget[1], retain[1])
    assert all(torch.equal(p, before[name]) for name, p in step.model.named_parameters())


def test_a_plan_leaves_what_lies_on_the_host_out(copies):
    plans = {}
    for offloaded in ("false", "true"):
        made = recipe("graddiff", "optimizer.name=adamw", f"optimizer.offload={offloaded}")
        step, forget, retain = prepared(tiny_olmoe(vocab_size=VOCAB).eval(), made)
        plans[offloaded] = step.plan(forget, retain)
        assert ("optimizer state" in held_at_rest(step.view(), step.prepared, 0, None)) == (offloaded == "false")
    plain, ours = plans["false"], plans["true"]
    held = plain.largest["optimizer state"]
    buffers = 2 * 4 * max(sum(map(_room, piece)) for piece in copies.pieces)
    assert ours.largest["optimizer state"] == buffers < held / 10
    assert ours.peak < plain.peak
    assert f"{held / 2**20:.2f} MiB of optimizer state lie on the host" in str(ours)
    assert "at an assumed 25 GB/s (predicted)" in str(ours) and "on the host" not in str(plain)
    with pytest.raises(ValueError, match="optimizer.offload needs whole weights on each rank.*optimizer.offload=false"):
        step.plan(forget, retain, mesh="fsdp=2")
    with pytest.raises(ValueError, match="got weights that ranks share out"):
        TrainedWeights(step.model, step.recipe, shards=object()).mask(step.prepared, step.optimizer)


def test_the_knob_comes_behind_the_narrow_state_where_memories_are_apart():
    made = recipe("graddiff", "optimizer.name=adamw")
    names = [knob.name for knob in knobs(made, 4, 80.0, apart=True)]
    assert names.index("offload") == len(names) - 1 - names[::-1].index("state") + 1 < names.index("scope")
    assert "offload" not in {knob.name for knob in knobs(made, 4, 80.0, apart=False)}
    assert "offload" not in {k.name for k in knobs(changed(made, ["optimizer.offload=true"]), 4, 80.0, apart=True)}
