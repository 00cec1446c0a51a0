"""Plans of deep models from shallow ones, against the rehearsal of the whole; knobs against the plans with them."""

import tracemalloc

import pytest
import torch

from moe_unlearn.config import Recipe
from moe_unlearn.model.states import decoder_layers
from moe_unlearn.plan import Mesh, Plan, knobs, rehearse
from moe_unlearn.plan.repeat import NotRepeated, depths, extended, peaks
from moe_unlearn.step import UnlearnStep
from tests.support.models import TINY_MODELS


def layered(count):
    """A timeline by hand: weights; forward, backward and an update whose loops go over all layers."""
    layer = [("activations", 5000), ("workspace", 7000), ("workspace", -7000)]
    events = [("weights", 10_000)] * count + layer * count
    events += [("workspace", 50_000), ("workspace", -50_000)]
    events += [("gradients", 6000), ("activations", -5000)] * count
    return events + [("workspace", 4), ("optimizer state", 8000)] * count


@pytest.mark.quick
@pytest.mark.parametrize("count", [4, 7, 40])
def test_the_peak_of_any_depth_follows_from_two(count):
    held, most, memory, largest = {}, 0, {}, {}
    for name, size in layered(count):
        held[name] = held.get(name, 0) + size
        largest[name] = max(largest.get(name, 0), held[name])
        if sum(held.values()) > most:
            most, memory = sum(held.values()), dict(held)
    found = peaks(layered(2), layered(3), count - 2)
    assert sum(found[0].values()) == most
    assert found == ({name: size for name, size in memory.items() if size}, largest)


@pytest.mark.quick
def test_a_step_of_many_micro_batches_is_repeated():
    low, high, deep = (layered(count) * 50 for count in (2, 3, 7))
    assert peaks(low, high, 5) == peaks(deep, deep, 1)


@pytest.mark.quick
def test_long_timelines_take_memory_by_their_length_not_its_square():
    short, long = layered(2000), layered(3000)
    tracemalloc.start()
    found = peaks(short, long, 1)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found[1]["activations"] == 3000 * 5000
    assert most < 100e6


@pytest.mark.quick
def test_timelines_that_differ_otherwise_are_refused():
    other = [(name, size + 4096 * i) for i, (name, size) in enumerate(layered(30))]
    with pytest.raises(NotRepeated, match="others"):
        peaks(layered(20), other, 2)
    with pytest.raises(NotRepeated, match="fewer"):
        peaks(layered(3), layered(2), 2)


def tiny(family, layers):
    torch.manual_seed(0)
    with torch.device("meta"):
        return TINY_MODELS[family](vocab_size=256, hidden_size=64, num_hidden_layers=layers).eval()


GIB = 2**30
CASES = [
    ("olmoe", 5, "graddiff", None),
    ("deepseek_v2", 6, "npo", None),
    ("qwen3_moe", 6, "trace", "fsdp=4,ep=2"),
    pytest.param("gpt_oss", 8, "kl_min", None, marks=pytest.mark.nightly),
    pytest.param("olmoe", 6, "mollm", None, marks=pytest.mark.nightly),
    pytest.param("olmoe", 6, "mollm batch_size=1 accumulate=8", None, marks=pytest.mark.nightly),
    pytest.param("mixtral", 7, "graddiff", "fsdp=4", marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(("family", "layers", "name", "mesh"), CASES)
@pytest.mark.slow(but=1)
def test_a_plan_from_shallow_models_is_that_of_the_whole(family, layers, name, mesh, monkeypatch):
    name, *overrides = name.split()
    recipe = Recipe.load(name, ["batch_size=2", "data.max_length=16", *overrides])
    step = UnlearnStep(tiny(family, layers), recipe)
    counts = depths(step.model, recipe, None if mesh is None else Mesh.parse(mesh))
    assert counts[1] < layers
    shallow = [UnlearnStep(tiny(family, count), recipe) for count in counts]
    whole = step.plan(mesh=mesh)
    repeated = []
    monkeypatch.setattr(rehearse, "extended", lambda *given: repeated.append(extended(*given)) or repeated[0])
    made = step.plan(mesh=mesh, shallow=shallow)
    assert repeated  # else the whole was rehearsed again
    for field in ("memory", "largest", "flops", "bytes", "traffic", "paths", "trained"):
        assert getattr(made, field) == getattr(whole, field), field


@pytest.mark.parametrize("overrides", [[], ["scope.kind=parameters", "scope.parameters=['experts']"]])
def test_the_mask_of_a_deep_model_is_bounded_by_shallow_ones(overrides):
    recipe = Recipe.load("wagle", ["batch_size=2", "data.max_length=16", "optimizer.name=sgd", *overrides])
    step = UnlearnStep(tiny("olmoe", 6), recipe)
    shallow = [UnlearnStep(tiny("olmoe", count), recipe) for count in depths(step.model, recipe)]
    whole, made = step.plan(), step.plan(shallow=shallow)
    assert not [note for note in made.notes if "not rehearsed" in note]
    assert made.memory == whole.memory
    found, bound = sum(whole.mask.values()), sum(made.mask.values())
    assert found <= bound <= 1.3 * found


@pytest.mark.quick
def test_layers_of_other_kinds_are_not_repeated():
    model = tiny("olmoe", 9)
    assert depths(model, Recipe.load("npo")) == (2, 3)
    assert depths(tiny("gpt_oss", 9), Recipe.load("npo")) == (5, 7)
    assert depths(tiny("olmoe", 3), Recipe.load("npo")) is None
    rmu = Recipe.load("rmu", ["forget.layer=4", r"scope.parameters=['layers\.[23]\..*experts']"])
    UnlearnStep(model, rmu)
    assert depths(model, rmu) == (7, 8)
    assert len(list(decoder_layers(model))) == 9


def peak(size, rest=0):
    """A plan with 10 GiB of weights whose mask takes `size` bytes beside them; a step takes `rest`."""
    weights = {"weights": 10 * GIB}
    return Plan(
        recipe="r", levers={}, weights=1, trained=1, layers=8, steps=1,
        memory=weights | {"rest": int(rest)}, mask=weights | {"rest": int(size)},
    )  # fmt: skip


def searched(planned, at_least=lambda overrides, mesh: 0, recipe=None):
    recipe = Recipe.load("combined", ["batch_size=8", "checkpointing=off"]) if recipe is None else recipe
    return knobs.Search(planned, at_least, recipe)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("costs", "said"),
    [
        # the first knob that suffices; micro-batches make it worse, and are no part of the answer
        ({"checkpointing": 20}, ["it fits with --set checkpointing=on"]),
        ({"accumulate": 40}, ["it fits with --set batch_size=4 accumulate=2"]),
        # two together; the cheaper one that is not needed is dropped; several devices leave the experiment as it is
        (
            {"checkpointing": 1, "wagle": 3, "scope": 18},
            [
                "it fits with --set wagle.memory=5120MiB scope.kind=experts",
                "or on several devices with --mesh fsdp=2",
            ],
        ),
        ({}, ["no knob of the recipe makes it fit on one device", "it fits on several devices with --mesh fsdp=2"]),
    ],
)
def test_the_cheapest_knobs_that_suffice_are_named(costs, said):
    tried = []

    def planned(overrides, mesh):
        tried.append((overrides, mesh))
        names = {text.split("=")[0].split(".")[0] for text in overrides}
        return peak((50 - sum(costs.get(name, 0) for name in names)) * GIB / (1 if mesh is None else 8))

    assert searched(planned).remedies(peak(50 * GIB), 40.0) == said
    assert len(tried) < 16 and len(set(tried)) == len(tried)


@pytest.mark.quick
def test_knobs_are_not_planned_that_leave_too_much_at_the_end_of_a_step():
    """Weights and state stay; they are 50 GiB, 30 with narrow moments and 12 of a quarter; the rest 15, or 5."""
    tried = []

    def at_least(overrides, mesh):
        narrow, few = "optimizer.state=int8" in overrides, "scope.kind=parameters" in overrides
        return (12 if few else 30 if narrow else 50) * GIB // (1 if mesh is None else 2)

    def planned(overrides, mesh):
        tried.append(overrides)
        rest = 5 if "checkpointing=on" in overrides else 15
        whole = (at_least(overrides, mesh) + rest * GIB) / GIB
        return Plan("r", {}, 1, 1, 8, 1, memory={"weights": 10 * GIB, "rest": int((whole - 10) * GIB)})

    search = searched(planned, at_least, Recipe.load("npo", ["checkpointing=off"]))
    first, *_ = search.remedies(planned((), None), 40.0)
    assert first == "it fits with --set checkpointing=on optimizer.state=int8"
    assert ("checkpointing=on",) not in tried and ("optimizer.state=bfloat16",) not in tried
    count = len(tried)
    assert search.remedies(planned((), None), 40.0)[0] == first
    assert len(tried) == count + 1, "what has been planned is planned again"


@pytest.mark.quick
def test_no_knob_is_tried_where_the_weights_alone_are_too_large():
    plan = peak(GIB)
    search = searched(lambda *_: pytest.fail("planned"), lambda *_: 10 * GIB)
    assert search.remedies(plan, 1.0) == ["no knob of the recipe makes it fit on one device"]
    plan.mesh = Mesh(2)
    assert search.remedies(plan, 1.0) == ["the weights of a rank alone take 10 GiB: no knob of the recipe makes it fit"]
