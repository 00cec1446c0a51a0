"""step.plan(): its memory against what a step allocates, its costs against formulas, and that it changes nothing."""

import itertools

import peft
import pytest
import torch

from moe_unlearn.backend import ENVIRONMENT_VARIABLE
from moe_unlearn.config import Recipe
from moe_unlearn.experts import experts_modules
from moe_unlearn.plan.memory import measured_peak
from moe_unlearn.prepare.preparation import Preparation
from moe_unlearn.prepare.rows import RowCache, values_of
from moe_unlearn.prepare.stages import CHOOSING, prepare
from moe_unlearn.step import UnlearnStep
from tests.support.batches import random_batch, with_refusals
from tests.support.impls import impl_of
from tests.support.models import TINY_MODELS
from tests.support.steps import made_of

pytestmark = pytest.mark.usefixtures("measurable_memory")

VOCAB, ROWS, LENGTH, HIDDEN = 256, 4, 48, 64
RECIPES = {
    "graddiff": [],
    "trace": ["trace.min_ratio=1.01", "scope.kind=experts"],  # 2 of 8 experts a layer, 2 of 4 for gpt-oss
    "wagle": ["wagle.keep=0.5"],
    "mollm": [],
}
FIXED = ("weights", "mask", "reference caches")


def tiny(family, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    with torch.device(device):
        return TINY_MODELS[family](vocab_size=VOCAB, hidden_size=HIDDEN).to(dtype).eval()


def batch(seed, rows=ROWS, length=LENGTH):
    return with_refusals(random_batch(VOCAB, rows, length, seed=seed), seed=seed)


def made(name, *overrides):
    return Recipe.load(name, [*RECIPES.get(name, []), "optimizer.lr=1e-4", *overrides])


def prepared(model, recipe, forget, retain):
    step = UnlearnStep(model, recipe)
    step.prepare([forget], [retain])
    return step


def check(step, forget, retain, device="cpu", allowed=0.1):
    """The prediction beyond weights, masks and caches against two steps as they happen."""
    plan = step.plan([forget], [retain])
    with measured_peak(device) as measured:
        for _ in range(2):
            step(forget, retain)
    predicted = plan.peak - sum(plan.memory.get(name, 0) for name in FIXED)
    assert predicted == pytest.approx(measured.peak, rel=allowed), str(plan)


SETTINGS = list(itertools.product(("float32", "bfloat16"), ("sgd", "adamw")))
# every recipe meets every family, and between the families three settings; nightly the other dtype and optimizer too
CASES = [
    pytest.param(family, name, *SETTINGS[k], marks=marks)
    for i, family in enumerate(("olmoe", "qwen3_moe", "gpt_oss"))
    for j, name in enumerate(RECIPES)
    for k, marks in (((0, 1, 3, 2)[(i + j) % 4], ()), ((3, 2, 0, 1)[(i + j) % 4], pytest.mark.nightly))
]


@pytest.mark.parametrize(("family", "name", "dtype", "optimizer"), CASES)
def test_memory_is_what_a_step_allocates(family, name, dtype, optimizer):
    forget, retain = batch(1), batch(2)
    model = tiny(family, getattr(torch, dtype))
    check(prepared(model, made(name, f"optimizer.name={optimizer}"), forget, retain), forget, retain)


@pytest.mark.parametrize("name", ["npo", "idk_dpo", "level", "kl_min", "undial", "seuf", "combined"])
def test_memory_follows_the_objective(name):
    overrides = ["trace.min_ratio=1.01"] if name == "combined" else []
    forget, retain = batch(1, rows=2), batch(2)
    check(prepared(tiny("olmoe"), made(name, *overrides), forget, retain), forget, retain)


@pytest.mark.quick
@pytest.mark.parametrize("override", ["guard=loss", "mollm.gradients=factors", "mollm.gradients=compact"])
@pytest.mark.slow
def test_memory_follows_the_way_of_the_gradients(override):
    name = "graddiff" if override == "guard=loss" else "mollm"
    forget, retain = batch(1), batch(2)
    step = prepared(tiny("olmoe"), made(name, override), forget, retain)
    check(step, forget, retain)
    way = {"guard=loss": "update"}.get(override, override.rpartition("=")[2])
    assert {path.way for path in step.plan([forget], [retain]).paths} == {way}


@pytest.mark.quick
@pytest.mark.parametrize("objective", ["npo", "undial"])
@pytest.mark.slow
def test_a_plan_with_the_experts_chosen_predicts_the_caches_of_the_stages_to_come(objective):
    forget, retain = batch(1), batch(2)
    step, whole = (UnlearnStep(tiny("olmoe"), made("trace", f"forget.objective={objective}")) for _ in range(2))
    step.prepare([forget], [retain], stages=CHOOSING)
    assert step.prepared.done == ["trace"]
    assert step.prepared.ref_logprobs is None and step.prepared.ref_hidden_states_forget is None
    whole.prepare([forget], [retain])
    plans = [s.plan([forget], [retain]) for s in (step, whole)]
    assert plans[0].levers["trace"] == plans[1].levers["trace"] and plans[0].trained == plans[1].trained
    assert plans[0].memory["reference caches"] == plans[1].memory["reference caches"] == held(whole)


def held(step):
    """The bytes of what prepare() keeps for later steps, by what it says of its own tensors."""
    caches = [v for k, v in vars(step.prepared).items() if k == "token_weights" or k.startswith("ref_")]
    return sum(cache.nbytes for cache in caches if cache is not None)


@pytest.mark.quick
@pytest.mark.parametrize("rehearsed", [True, False])
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("kl_min", []),
        ("mollm", []),
        ("undial", ["scope.kind=all", "scope.parameters=[]"]),
        ("undial", []),  # its head is frozen
        ("idk_dpo", []),
        ("level", ["mollm=null"]),
        ("rmu", ["forget.layer=0", r"scope.parameters=['layers\.0\.mlp.*down_proj']"]),
        ("trace", ["trace.refresh=offline"]),
    ],
)
@pytest.mark.slow
def test_the_caches_are_counted_once_before_and_after_prepare(name, overrides, rehearsed, tmp_path):
    """In memory; and where a step is not rehearsed, of which this does not depend, on disk."""
    model, forget, retain = tiny("olmoe"), batch(1, rows=2), batch(2)
    on_disk = not rehearsed
    if not rehearsed:
        model.model.embed_tokens.register_forward_hook(lambda module, args, out: [out.detach().numpy()] and None)
    step = UnlearnStep(model, made(name, *overrides))
    plans = [step.plan([forget], [retain], stored=on_disk)]
    step.prepare([forget], [retain], cache_dir=tmp_path if on_disk else None)
    plans.append(step.plan([forget], [retain], stored=on_disk))
    assert [plan.memory.get("reference caches", 0) for plan in plans] == [held(step)] * 2
    assert any("not rehearsed" in note for note in plans[1].notes) != rehearsed
    caches = [v for k, v in vars(step.prepared).items() if k.startswith("ref_") and isinstance(v, RowCache)]
    stored = sum(values_of(row).nbytes for cache in caches for row in cache._rows.values()) if on_disk else 0
    said = [note for note in plans[0].notes if note.endswith("MiB on disk")]
    assert said == ([f"the reference's values take {stored / 2**20:.2f} MiB on disk"] if stored else [])


@pytest.mark.quick
@pytest.mark.slow
def test_memory_with_micro_batches_and_state():
    accumulate = 3
    step = UnlearnStep(tiny("olmoe"), made("graddiff", f"accumulate={accumulate}"))
    forget, retain = batch(1), batch(2)
    step(forget, retain)
    plan = step.plan([forget], [retain])
    state = sum(v.numel() * v.element_size() for s in step.optimizer.state.values() for v in s.values())
    assert plan.memory["optimizer state"] == state
    with measured_peak("cpu") as measured:
        for i in range(accumulate):
            step(forget, retain, update=i + 1 == accumulate)
    beyond = plan.peak - sum(plan.memory.get(name, 0) for name in (*FIXED, "optimizer state"))
    assert beyond == pytest.approx(measured.peak, rel=0.1)


@pytest.mark.quick
@pytest.mark.slow
def test_factors_of_micro_batches_add_up():
    accumulate = 6
    overrides = "mollm.gradients=factors", "optimizer.name=sgd", f"accumulate={accumulate}"
    step = UnlearnStep(tiny("olmoe"), made("mollm", *overrides))
    pair = batch(1, rows=2, length=8), batch(2, rows=2, length=8)
    step.prepare(*([side] for side in pair))
    plan = step.plan(*([side] for side in pair))
    with measured_peak("cpu") as measured:
        made_of(step, [pair] * accumulate)
    beyond = plan.peak - sum(plan.memory.get(name, 0) for name in FIXED)
    assert beyond == pytest.approx(measured.peak, rel=0.1), str(plan)


@pytest.mark.quick
@pytest.mark.slow
def test_a_padded_batch_and_a_full_one_take_their_own_attention():
    full = {"input_ids": torch.full((4, 64), 5), "attention_mask": torch.ones(4, 64, dtype=torch.int64)}
    full["labels"] = full["input_ids"]
    step = UnlearnStep(tiny("olmoe"), made("graddiff", "optimizer.name=sgd"))
    check(step, full, full)


@pytest.mark.parametrize("where", ["attention", "experts"])
@pytest.mark.parametrize("name", ["npo", "mollm"])
def test_memory_and_paths_with_adapters(where, name):
    on = {
        "attention": {"target_modules": ["q_proj", "v_proj"]},
        "experts": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    }
    model = peft.get_peft_model(tiny("olmoe"), peft.LoraConfig(r=4, **on[where]))
    forget, retain = batch(1), batch(2)
    step = prepared(model, made(name), forget, retain)
    check(step, forget, retain)
    way = {"attention": "frozen", "experts": "autograd"}[where]
    assert [path.way for path in step.plan([forget], [retain]).paths] == [way] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", RECIPES)
def test_memory_on_a_gpu(name):
    forget, retain = ({k: v.cuda() for k, v in batch(seed, 16, 256).items()} for seed in (1, 2))
    model = TINY_MODELS["olmoe"](vocab_size=VOCAB, hidden_size=256).to("cuda", torch.bfloat16).eval()
    step = prepared(model, made(name), forget, retain)
    step(forget, retain, update=False)
    step.discard()  # kernels are compiled and cuBLAS has its workspace
    check(step, forget, retain, "cuda")


def state_of(step):
    """Everything a plan could disturb, by value."""
    tensors = {f"model {n}": t.clone() for n, t in step.model.state_dict().items()}
    for i, state in enumerate(step.optimizer.state.values()):
        tensors |= {f"state {i} {k}": v.clone() for k, v in state.items()}
    tensors |= {f"grad {n}": p.grad.clone() for n, p in step.model.named_parameters() if p.grad is not None}
    tensors |= {f"mask {n}": m.clone() for n, m in step.masks.items()}
    tensors["random"] = torch.get_rng_state()
    plain = {
        "steps": step.steps,
        "done": step.done,
        "stages": list(step.prepared.done),
        "attributes": sorted(vars(step)),
        "flags": {n: p.requires_grad for n, p in step.model.named_parameters()},
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in step.model.modules()],
        "optimizer hooks": len(step.optimizer._optimizer_step_pre_hooks),
        "gates": [m.__dict__.get("_moe_unlearn") for m in experts_modules(step.model).values()],
        "versions": [p._version for p in step.model.parameters()],
        "micro-batches": [dict(part.losses) for part in step.tally.parts],
    }
    return tensors, plain


def test_planning_changes_nothing():
    forget, retain = batch(1), batch(2)
    step = UnlearnStep(tiny("olmoe"), made("combined", "trace.min_ratio=1.01"))
    for stage in ("new", "prepared", "stepped", "accumulated"):
        if stage == "prepared":
            step.prepare([forget], [retain])
        elif stage == "stepped":
            step(forget, retain)
        elif stage == "accumulated":
            step(forget, retain, update=False)
        tensors, plain = state_of(step)
        step.plan([forget], [retain], fits=1e-6 if stage == "prepared" else None)  # too small, so that knobs are tried
        if stage in ("new", "accumulated"):
            step.plan([forget], [retain], mesh="fsdp=4,ep=2", fits=80)
        tensors_after, plain_after = state_of(step)
        assert plain_after == plain, stage
        assert tensors_after.keys() == tensors.keys()
        for key, value in tensors.items():
            assert torch.equal(tensors_after[key], value), (stage, key)
    step.update()


@pytest.mark.quick
@pytest.mark.parametrize(("family", "name"), [("gpt_oss", "graddiff"), ("olmoe", "combined")])
@pytest.mark.slow
def test_a_model_without_weights_gets_the_plan_of_the_real_one(family, name):
    forget, retain = batch(1), batch(2)
    plans = {}
    for device in ("cpu", "meta"):
        step = UnlearnStep(tiny(family, device=device), made(name))
        plans[device] = step.plan([forget], [retain])
        if device == "meta":
            assert all(p.is_meta for p in step.model.parameters())
    assert plans["meta"].flops == plans["cpu"].flops
    assert plans["meta"].peak == pytest.approx(plans["cpu"].peak, rel=0.01)


@pytest.mark.quick
def test_a_gate_is_probed_where_there_are_no_weights_too():
    model = tiny("olmoe", device="meta")
    for module in experts_modules(model).values():
        module._apply_gate = lambda z: z.chunk(2, -1)[0].sin() * z.chunk(2, -1)[1]
    with pytest.warns(UserWarning, match="none of the known formulas"):
        plan = UnlearnStep(model, made("graddiff")).plan([batch(1)], [batch(2)])
    assert "expert_mlp" not in plan.flops


@pytest.mark.quick
@pytest.mark.slow
def test_without_batches_the_recipe_says_their_size():
    step = UnlearnStep(tiny("olmoe"), made("graddiff", "batch_size=2", "data.max_length=32"))
    assert step.plan().shape == "forget 2 x 32, retain 2 x 32"
    small, large = batch(1, rows=1), batch(2, rows=3)
    plan = step.plan([small, large], [small])
    assert plan.shape == "forget 3 x 48, retain 1 x 48"
    with pytest.raises(ValueError, match="retain batch has no 'labels'"):
        step.plan([small], [{k: v for k, v in small.items() if k != "labels"}])


@pytest.mark.quick
def test_flops_are_those_of_the_products():
    model = tiny("olmoe")
    step = UnlearnStep(model, made("graddiff", "optimizer.name=sgd"))
    forget, retain = batch(1), batch(2)
    flops = step.plan([forget], [retain]).flops
    module = next(iter(experts_modules(model).values()))
    tokens, top_k, layers = 2 * ROWS * LENGTH, model.config.num_experts_per_tok, model.config.num_hidden_layers
    one_expert = module.gate_up_proj[0].numel() + module.down_proj[0].numel()
    forward = 2 * tokens * top_k * one_expert * layers
    assert flops["expert_mlp"] == flops["expert_mlp_backward"] == flops["expert_wgrad"] == forward
    counted = sum(int((b["labels"][:, 1:] != -100).sum()) for b in (forget, retain))
    assert flops["token_loss"] % (2 * counted * VOCAB * HIDDEN) == 0
    heads = model.config.num_attention_heads
    scores = 2 * 2 * 2 * ROWS * heads * LENGTH * LENGTH * (HIDDEN // heads) * layers
    assert flops["attention"] == pytest.approx(3.5 * scores)


@pytest.mark.parametrize(
    "impl, name, products",
    [
        ("triton", "graddiff", 4),
        ("triton", "trace", 2),  # the head is frozen
        ("triton", "kl_min", 5),  # of kl six
        ("cpu", "graddiff", 3),
        ("cpu", "trace", 2),
        ("ref", "graddiff", 4),
        ("ref", "trace", 3),
        ("ref", "rmu", None),
    ],
)
def test_a_plan_says_how_often_a_loss_multiplies_rows_and_head(impl, name, products, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, impl)
    of_two_layers = ["scope.parameters=['experts']", "forget.layer=1"] if name == "rmu" else []
    step = UnlearnStep(tiny("olmoe", device=impl_of(impl).device), made(name, *of_two_layers))
    line = step.plan([batch(1)], [batch(2)]).levers.get("head")
    assert line == (products and f"a loss multiplies rows and head {products} times on average")


@pytest.mark.quick
@pytest.mark.slow
def test_fewer_trained_experts_take_less():
    forget, retain = batch(1), batch(2)
    step = prepared(tiny("olmoe"), made("trace", "trace.per_layer=1"), forget, retain)
    plan = step.plan([forget], [retain])
    everything = UnlearnStep(tiny("olmoe"), made("graddiff")).plan([forget], [retain])
    assert plan.largest["optimizer state"] < 0.2 * everything.largest["optimizer state"]
    assert plan.peak < everything.peak


@pytest.mark.quick
@pytest.mark.slow
def test_a_step_that_verifies_is_rehearsed_too():
    """Its copy verified itself, which no copy on fake tensors can do."""
    plans = [UnlearnStep(tiny("olmoe"), made("graddiff"), verify=n).plan([batch(1)], [batch(2)]) for n in (0, 2)]
    assert plans[0].memory == plans[1].memory and plans[0].peak > plans[0].memory["weights"]


@pytest.mark.quick
def test_what_cannot_be_rehearsed_is_said():
    model = tiny("olmoe")
    model.model.norm.register_forward_pre_hook(lambda module, args: float(args[0].detach().numpy()[0, 0, 0]) and None)
    plan = UnlearnStep(model, made("graddiff")).plan([batch(1)], [batch(2)])
    assert set(plan.memory) == {"weights", "optimizer state"}
    assert any(note.startswith("not rehearsed") for note in plan.notes)
    assert "not rehearsed" in str(plan)


@pytest.mark.quick
@pytest.mark.slow
def test_the_table_says_paths_costs_and_memory():
    step = UnlearnStep(tiny("olmoe"), made("mollm"))
    plan = step.plan([batch(1)], [batch(2)])
    assert [path.layer for path in plan.paths] == list(experts_modules(step.model))
    assert plan.peak == sum(plan.memory.values()) <= sum(plan.largest.values())
    text = str(plan)
    for word in (
        "(2 layers): factors, 8 of 8 experts; MOLLM",
        "expert_wgrad",
        "GFLOP",
        "activations",
        "workspace",
        "peak",
        "3 gradient sets",
    ):
        assert word in text
    plan.paths[0] = plan.paths[0]._replace(way="update", reason="no reason")
    assert "layers.0.mlp.experts: update, 8 of 8 experts; no reason" in str(plan)


@pytest.mark.parametrize(
    "family, dtype, part",
    [
        # by day a second number of groups on one family
        pytest.param(family, dtype, part, marks=pytest.mark.nightly if part == 0.5 and family != "olmoe" else ())
        for family, dtype in (("olmoe", "float32"), ("qwen3_moe", "bfloat16"), ("gpt_oss", "float32"))
        for part in (None, 0.5, 0.2)
    ],
)
def test_the_memory_of_a_mask_is_what_making_it_allocates(family, dtype, part):
    model, forget, retain = tiny(family, getattr(torch, dtype)), [batch(1), batch(2)], [batch(3), batch(4)]
    size = sum(8 * p.numel() for p in model.parameters())
    recipe = made("wagle", f"wagle.memory={'null' if part is None else int(part * size)}")
    plan = UnlearnStep(model, recipe).plan(forget, retain)
    with measured_peak("cpu") as measured:
        prepare(model, recipe, Preparation(), forget, retain)
    predicted = sum(plan.mask.values()) - plan.mask["weights"]
    assert predicted == pytest.approx(measured.peak, rel=0.15), plan.mask
    (note,) = [note for note in plan.notes if "WAGLE's mask" in note]
    assert ("groups" in note) == (part is not None) and f"{sum(plan.mask.values()) / 2**20:.2f} MiB at the peak" in note
