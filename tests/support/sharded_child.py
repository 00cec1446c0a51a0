"""Ranks make unlearning steps on a model whose weights FSDP2 shards; the first writes the weights."""

from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from moe_unlearn.config import Recipe
from moe_unlearn.experts import experts_modules
from moe_unlearn.sharding import whole
from moe_unlearn.step import UnlearnStep
from tests.support.models import TINY_MODELS
from tests.support.steps import VOCAB, data, made_of, recipe

STEPS = 2
ADAMW = ("optimizer.name=adamw", "optimizer.weight_decay=0.1", "optimizer.eps=1e-4")
SGD = ("optimizer.name=sgd", "optimizer.momentum=0.9")
FLOOR = ("mollm.kl_floor=0", "mollm.gradients=compact")
# name -> recipe, what is changed in it, what the step itself is asked
CASES = {
    "graddiff sgd": ("graddiff", SGD, {}),
    "graddiff adamw": ("graddiff", ADAMW, {}),
    "graddiff clip": ("graddiff", (*ADAMW, "optimizer.max_grad_norm=0.5"), {}),
    "npo": ("npo", ADAMW, {}),
    "npo plain": ("npo", ADAMW, {"fused": False}),
    "trace": ("trace", (*ADAMW, "scope.kind=experts"), {}),
    "wagle npo": ("wagle", (*ADAMW, "wagle.keep=0.3"), {}),
    "wagle graddiff": ("graddiff", (*ADAMW, "wagle={keep: 0.3}"), {}),
    "mollm": ("mollm", (*SGD, *FLOOR), {}),
    "combined": ("combined", (*ADAMW, *FLOOR), {}),
}
CASES |= {
    f"{family} {name}": (*CASES[name][:2], {"family": family})
    for family in ("qwen3_moe", "gpt_oss")
    for name in ("graddiff adamw", "wagle npo", "combined")
}
# objectives beside those
MORE = {
    "ga": ("ga", SGD, {}),
    "rmu": ("rmu", SGD, {}),
    "seuf": ("seuf", ADAMW, {}),
    "simnpo": ("simnpo", ADAMW, {}),
    "idk_dpo": ("idk_dpo", ADAMW, {}),
    "level": ("level", (*SGD, *FLOOR), {}),
    "kl_min": ("kl_min", ADAMW, {}),
    "trace online": ("trace", (*ADAMW, "trace.refresh=online"), {}),
    "checkpointing": ("npo", ADAMW, {"checkpointing": True}),
    "lora": ("npo", ADAMW, {"lora": True}),
}
ALL = CASES | MORE
# what takes other roads where nothing is sent
UNSENT = {
    "update": ("graddiff", (*SGD, "guard=loss"), {}),
    "update adamw": ("npo", (*ADAMW, "guard=loss"), {}),
    "update trace": ("trace", (*ADAMW, "scope.kind=experts", "guard=loss"), {}),
    "factors": ("mollm", (*SGD, "mollm.kl_floor=0", "mollm.gradients=factors"), {}),
    "factors trace": ("combined", (*ADAMW, "mollm.kl_floor=0", "mollm.gradients=factors"), {}),
}
KNOWN = ALL | UNSENT
UNEVEN = ("graddiff adamw", "npo", "trace", "wagle npo", "combined")
# how the weights of a case are shared out; per layer where nothing stands
APART = {"graddiff adamw": "experts", "trace": "experts", "npo": "head", "mollm": "root"}


def model(name: str = "graddiff sgd") -> nn.Module:
    """The model of a case."""
    asked = KNOWN[name][2]
    torch.manual_seed(0)
    made = TINY_MODELS[asked.get("family", "olmoe")](VOCAB).eval()
    if "checkpointing" in asked:
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        made.train()
    if "lora" in asked:
        experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        settings = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=experts, init_lora_weights=False)
        made = peft.get_peft_model(made, settings).eval()
    return made


def shard(made: nn.Module, how: str = "layers", **keywords) -> nn.Module:
    inner = made.get_base_model() if hasattr(made, "get_base_model") else made
    if how == "experts":
        for module in experts_modules(made).values():
            fully_shard(module, **keywords)
    if how == "head":
        fully_shard(made.lm_head, **keywords)
    if how != "root":
        for layer in inner.model.layers:
            fully_shard(layer, **keywords)
    return fully_shard(made, **keywords)


def batches_of(i: int, rank: int, ranks: int) -> tuple[dict, dict]:
    """Return what a rank has as micro-batch `i`; ranks have tokens and rows of their own number."""
    forget, retain = data()
    which = (ranks * i + rank) % len(forget)
    return tuple({key: value[rank % 2 :] for key, value in batch.items()} for batch in (forget[which], retain[which]))


def recipe_of(name: str) -> Recipe:
    base, changes, _ = KNOWN[name]
    return recipe(base, *changes, lr=1e-2)


def step_of(made: nn.Module, name: str, *, fused: bool = True) -> UnlearnStep:
    """The prepared step of a case."""
    step = UnlearnStep(made, recipe_of(name), fused=fused and KNOWN[name][2].get("fused", True))
    step.prepare(*data())
    return step


def weights_of(step: UnlearnStep) -> dict:
    return {name: whole(p.detach()).clone() for name, p in step.model.named_parameters()}


def masks_of(step: UnlearnStep) -> dict:
    mask = step.prepared.mask
    return {} if mask is None else {f"mask of {name}": mask.words(name).clone() for name in mask.names}


def run(name: str, rank: int, folder: Path) -> list[dict]:
    """Make the steps of a case and write the weights; return the metrics."""
    step = step_of(shard(model(name), APART.get(name, "layers")), name)
    ranks = distributed.get_world_size()
    metrics = [made_of(step, [batches_of(i, rank, ranks)]) for i in range(STEPS)]
    after = weights_of(step) | masks_of(step)
    if rank == 0:
        save_file(after, folder / f"{name}.safetensors")
    return metrics


def cached(rank: int, folder: Path) -> list:
    """How many files of references each rank keeps after two preparations, and whether the second found the first's."""
    found = []
    for _ in range(2):
        step = UnlearnStep(shard(model()), recipe("npo"))
        # disks of their own: the first rank's holds the references, the other's nothing
        step.prepare(*data(), cache_dir=folder / f"cache{rank}")
        found.append(step.prepared.ref_logprobs)
    first, second = (torch.cat([cache.get(batch).flatten() for batch in data()[0]]) for cache in found)
    return [len(list((folder / f"cache{rank}").rglob("*.safetensors"))), torch.equal(first, second)]


def another_dimension() -> str:
    """Return what is said of weights that are cut along another dimension than 0."""
    made = model()
    fully_shard(made, shard_placement_fn=lambda p: Shard(p.dim() - 1))
    try:
        UnlearnStep(made, recipe("graddiff"))
    except ValueError as error:
        return str(error)
    return "none"


def found_by(rank: int, folder: Path) -> dict:
    """Make the steps of every case; return the metrics, and the errors that were met."""
    if distributed.get_world_size() == 3:  # rows that three do not share out evenly
        return {name: run(name, rank, folder) for name in UNEVEN}
    found = {name: run(name, rank, folder) for name in ALL}
    found |= {"another dimension": another_dimension(), "cached": cached(rank, folder)}
    return found
