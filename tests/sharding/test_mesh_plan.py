"""Plans for meshes: one rank's memory and traffic against what four gloo ranks hold and send, and against formulas."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard

from moe_unlearn.cli import main
from moe_unlearn.config import Recipe
from moe_unlearn.experts import experts_modules
from moe_unlearn.plan import Mesh
from moe_unlearn.step import UnlearnStep
from tests.support import mesh_child
from tests.support.batches import random_batch, with_refusals
from tests.support.forked_ranks import found_on
from tests.support.meshes import CASES, RANKS, VOCAB, batches, model_of, recipe, save
from tests.support.models import TINY_MODELS


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp=2", "its dimensions are fsdp and ep; got 'tp'"),
        ("fsdp=two", "with whole numbers; got fsdp=two"),
        ("fsdp=1.5", "expected a mesh such as fsdp=8"),
        ("fsdp=", "with whole numbers; got fsdp="),
        ("4", "expected a mesh such as fsdp=8"),
        ("fsdp=4,fsdp=2", "got fsdp twice"),
        ("fsdp=0", "sizes of at least 1; got fsdp=0"),
        ("fsdp=4,ep=-2", "sizes of at least 1; got ep=-2"),
        ("fsdp=4,ep=3", "ep divides fsdp, the number of all ranks; got fsdp=4 and ep=3"),
        ("ep=2", "ep divides fsdp, the number of all ranks; got fsdp=1 and ep=2"),
    ],
)
def test_what_is_no_mesh_is_said(text, message):
    with pytest.raises(ValueError) as caught:
        Mesh.parse(text)
    assert message in str(caught.value)


@pytest.mark.quick
def test_a_mesh_is_read_and_shown():
    assert Mesh.parse(" fsdp=4, ep = 2") == Mesh(4, 2) and str(Mesh(4, 2)) == "4 ranks (fsdp 4, ep 2)"
    assert Mesh.parse("fsdp=8") == Mesh(8) and str(Mesh(8)) == "8 ranks (fsdp 8)"


def tiny(family="olmoe", **changes):
    torch.manual_seed(0)
    return TINY_MODELS[family](VOCAB, hidden_size=64, **changes).eval()


def pair(rows=2, length=16):
    return [[with_refusals(random_batch(VOCAB, rows, length, seed=seed), seed=seed)] for seed in (1, 2)]


@pytest.mark.quick
def test_a_model_that_does_not_fit_is_refused():
    step = UnlearnStep(tiny(num_experts=6), "graddiff")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.gate_up_proj has 6 experts, which ep=4 ranks"):
        step.plan(*pair(), mesh="fsdp=8,ep=4")


@pytest.mark.quick
@pytest.mark.parametrize("given", [None, "fsdp=2"])
def test_a_model_that_is_sharded_already_is_refused_with_the_mesh_to_give(given):
    step = UnlearnStep(tiny(), "graddiff")
    weight = next(iter(experts_modules(step.model).values())).down_proj
    # as torch's DTensor has them
    weight.placements = (_StridedShard(0, split_factor=2), Shard(0))
    weight.device_mesh = SimpleNamespace(ndim=2, shape=(3, 2), mesh_dim_names=("efsdp", "ep"))
    with pytest.raises(ValueError, match="sharded already: plan a step .* with mesh='fsdp=6,ep=2'"):
        step.plan(*pair(), mesh=given)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Return what each rank measured, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    save(folder)
    found = found_on(RANKS, folder, lambda rank: mesh_child.found_by(folder))
    return {name: [own[name] for own in found] for name in CASES}


@pytest.fixture(scope="module")
def plans():
    """The plan of each case; the plain path, whose gradients are autograd's as in the ranks' loop."""
    forget, retain = batches()
    steps = {name: UnlearnStep(model_of(name), recipe(), fused=False) for name in CASES}
    return {name: step.plan([forget], [retain], mesh=CASES[name].mesh) for name, step in steps.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("measurable_memory")
def test_memory_is_what_ranks_hold(name, measured, plans):
    ranks, plan = measured[name], plans[name]
    assert plan.memory["weights"] == max(rank["weights"] + rank["buffers"] for rank in ranks)
    assert plan.memory["optimizer state"] == max(rank["optimizer state"] for rank in ranks)
    beyond = plan.peak - plan.memory["weights"] - plan.memory["optimizer state"]
    # the plan spreads tokens evenly over the experts, which routers do on the average only; else some scalars differ
    near = 1e-4 if Mesh.parse(CASES[name].mesh).ep == 1 else 0.1
    assert beyond == pytest.approx(min(rank["peak"] for rank in ranks), rel=near), str(plan)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_traffic_is_what_ranks_send(name, measured, plans):
    ranks, plan = measured[name], plans[name]
    tokens = plan.traffic.get("all_to_all of tokens", 0)
    # the plan spreads tokens evenly over the experts, which routers do on the average only
    assert tokens == pytest.approx(sum(rank["exchanged"] for rank in ranks) / len(ranks), rel=0.1), str(plan)
    rest = [rank["sent"] - rank["exchanged"] for rank in ranks]
    assert sum(plan.traffic.values()) - tokens == max(rest), str(plan)
    assert tokens > 0 or Mesh.parse(CASES[name].mesh).ep == 1


def made(name, *overrides):
    return Recipe.load(name, ["optimizer.lr=1e-4", *overrides])


RUNS = [
    ("olmoe", "npo", "fsdp=3"),
    ("qwen3_moe", "combined", "fsdp=4,ep=2"),
    pytest.param("gpt_oss", "mollm", "fsdp=4,ep=4", marks=pytest.mark.nightly),
    ("olmoe", "rmu", "fsdp=2"),
    ("olmoe", "seuf", "fsdp=4,ep=2"),
]


@pytest.mark.quick
@pytest.mark.parametrize(("family", "name", "mesh"), RUNS)
@pytest.mark.slow(but=1)
def test_every_kind_of_step_is_rehearsed(family, name, mesh):
    overrides = ["forget.layer=1", "scope.parameters=['down_proj']"] if name == "rmu" else []
    plan = UnlearnStep(tiny(family), made(name, *overrides)).plan(*pair(), mesh=mesh)
    assert not any("not rehearsed" in note for note in plan.notes), plan.notes
    one = UnlearnStep(tiny(family), made(name, *overrides)).plan(*pair())
    assert plan.memory["weights"] < one.memory["weights"] and plan.largest["gradients"] < one.largest["gradients"]
    assert plan.traffic["all_gather of weights, forward"] > 0
    assert ("all_to_all of tokens" in plan.traffic) == ("ep" in mesh)


@pytest.mark.quick
def test_experts_that_one_rank_has_alone_are_updated_in_the_backward_pass():
    meshes = ("fsdp=4", "fsdp=4,ep=2", "fsdp=4,ep=4")
    step = UnlearnStep(tiny(), made("graddiff", "guard=loss"))
    whole, half, own = (step.plan(*pair(), mesh=mesh) for mesh in meshes)
    for plan, ranks in ((whole, 4), (half, 2)):
        assert {(path.way, path.reason) for path in plan.paths} == {
            ("compact", f"the gradients of {ranks} ranks are added up")
        }
    assert {path.way for path in own.paths} == {"update"}
    assert not any("not rehearsed" in note for note in own.notes), own.notes
    experts = sum(p.nbytes for module in experts_modules(step.model).values() for p in module.parameters()) / 4
    assert half.largest["gradients"] - own.largest["gradients"] == experts
    assert "all_to_all of compact gradients" not in own.traffic


@pytest.mark.quick
def test_the_rank_is_the_one_that_holds_most():
    step = UnlearnStep(tiny(), made("trace", "trace.min_ratio=0.01", "trace.per_layer=3", "scope.kind=experts"))
    step.prepare(*pair())
    plan = step.plan(*pair(), mesh="fsdp=4")
    held = [0] * 4  # trained experts of each rank, which has 2 of 8
    for chosen in step.prepared.selected.tolist():
        for expert, trains in enumerate(chosen):
            held[expert // 2] += trains
    module = next(iter(experts_modules(step.model).values()))
    expert = sum(p[:1].nbytes for p in module.parameters())
    assert max(held) > min(held)
    assert 0 <= plan.largest["optimizer state"] - 2 * max(held) * expert < 100  # counts of steps, numbers of slices
    assert plan.largest["gradients"] == max(held) * expert
    # the rank computes a gradient of each trained expert, and sends it on unless the expert is its own
    assert sum(held) > max(held)
    assert plan.traffic["all_to_all of compact gradients"] == (sum(held) - max(held)) * expert
    assert "reduce_scatter of gradients" not in plan.traffic


@pytest.mark.quick
def test_micro_batches_are_all_sent():
    single, several = (
        UnlearnStep(tiny(), made("graddiff", f"accumulate={n}")).plan(*pair(), mesh="fsdp=2") for n in (1, 3)
    )
    assert several.traffic == {cause: 3 * size for cause, size in single.traffic.items()}
    assert several.largest["gradients"] == single.largest["gradients"]


@pytest.mark.quick
def test_more_ranks_than_experts_gather_rows_that_are_not_there():
    plan = UnlearnStep(tiny(), made("graddiff")).plan(*pair(), mesh="fsdp=16")
    assert any("8 rows for 16 ranks" in note for note in plan.notes)
    assert not any("rows for" in note for note in UnlearnStep(tiny(), "graddiff").plan(*pair(), mesh="fsdp=8").notes)


@pytest.mark.quick
def test_what_cannot_be_rehearsed_has_the_parts_at_rest():
    model = tiny()
    model.model.norm.register_forward_pre_hook(lambda module, args: float(args[0].detach().numpy()[0, 0, 0]) and None)
    plan = UnlearnStep(model, made("graddiff")).plan(*pair(), mesh="fsdp=4,ep=2")
    weights = sum(p.nbytes for p in model.parameters()) / 4
    assert plan.memory == {"weights": weights, "optimizer state": 2 * weights}


@pytest.mark.quick
def test_the_command_line_says_whether_it_fits(tmp_path, capsys):
    tiny().config.save_pretrained(tmp_path)
    planned = ["run", "graddiff", "--model-config", str(tmp_path), "--set", "data.max_length=16", "batch_size=1"]
    assert main([*planned, "--dry-run", "--mesh", "fsdp=4,ep=2", "--fits", "80"]) == 0
    text = capsys.readouterr().out
    assert "mesh: 4 ranks (fsdp 4, ep 2); below is the rank that holds most" in text
    assert "all_to_all of tokens" in text and "fits on 4 x 80 GiB: yes, 0.00" in text
    assert main([*planned, "--dry-run", "--fits", "0.0001"]) == 0
    text = capsys.readouterr().out
    assert "fits on 1 x 0.0001 GiB: no, 0.00" in text and "mesh" not in text and "sent in a step" not in text
    for wrong, message in (
        (["--mesh", "fsdp=2"], "--mesh is of 2 ranks (fsdp 2); this run has 1: start it with torchrun"),
        (["--fits", "80"], "--fits asks for a plan, and goes with --dry-run"),
        (["--dry-run", "--mesh", "fsdp=8,ep=8,tp=2"], "its dimensions are fsdp and ep; got 'tp'"),
        (["--dry-run", "--fits", "-1"], "fits must be above 0 GiB; got -1"),
    ):
        assert main([*planned, *wrong]) == 2
        assert message in capsys.readouterr().err
