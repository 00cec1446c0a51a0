"""Two ranks verify their steps: with whole weights, under FSDP2, and with experts that each has alone."""

import contextlib
from pathlib import Path
from unittest import mock

import torch
from torch import distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.distributed import DistributedConfig

from moe_unlearn.ranks import RankError, Ranks
from moe_unlearn.sharding import part
from moe_unlearn.step import UnlearnStep
from moe_unlearn.step.gradients import GradientStore
from moe_unlearn.verify import VerificationError
from tests.support import sharded_child
from tests.support.sharded_child import batches_of, recipe_of, shard
from tests.support.steps import data, made_of

RANKS, STEPS = 2, 2
ENGINES = ("whole", "fsdp", "experts")
# engine -> the cases of `sharded_child` that it verifies; the soak verifies all
NAMES = {
    "whole": ("combined",),
    "fsdp": ("combined", "npo", "lora"),
    "experts": ("update adamw", "wagle graddiff"),
}
# the dtype in which a case is verified, if it is another than float32
DTYPES = {"npo": torch.bfloat16}
# what ends with an error on both ranks, and on which engines
FAULTS = {
    "one gradient": ENGINES,
    "no gradient": ("fsdp",),
    "one update": ("whole",),
    "one draws": ("whole", "fsdp"),
    "one stops": ("fsdp",),
}


def model_of(engine: str, folder: Path, name: str = "graddiff sgd") -> nn.Module:
    dtype = DTYPES.get(name, torch.float32)
    if engine == "experts":
        config = DistributedConfig(fsdp_size=RANKS, ep_size=RANKS)
        return type(sharded_child.model()).from_pretrained(folder / "model", distributed_config=config).eval()
    made = sharded_child.model(name).to(dtype)
    return made if engine == "whole" else shard(made)


def step_of(engine: str, folder: Path, name: str = "graddiff sgd", *, verify: int | bool = True) -> UnlearnStep:
    group = distributed.group.WORLD
    step = UnlearnStep(model_of(engine, folder, name), recipe_of(name), verify=verify, process_group=group)
    step.prepare(*data())
    return step


def own_weights(step: UnlearnStep) -> list[torch.Tensor]:
    return [part(p.detach()).clone() for p in step.model.parameters()]


def pairs_of(rank: int) -> list:
    return [batches_of(i, rank, RANKS) for i in range(2)]


def verified(engine: str, name: str, rank: int, folder: Path) -> dict:
    """Return what is reported of steps, the first of two micro-batches, and whether they are those of another run."""
    ends, found = [], {}
    for verify in (STEPS, 0):
        torch.manual_seed(rank)
        step = step_of(engine, folder, name, verify=verify)
        metrics = [made_of(step, pairs_of(rank))]
        found.setdefault("twin", step.verifier.plain is not None)
        metrics.append(step(*batches_of(2, rank, RANKS)))
        if verify:
            found |= {"metrics": metrics, "report": step.verifier.summary()}
        ends.append([*own_weights(step), torch.get_rng_state()])
    return found | {"same": all(map(torch.equal, *ends))}


def spoilt(engine: str, fault: str, rank: int, folder: Path) -> dict:
    """The error of a step in which the second rank has a fault, and what it leaves."""
    step = step_of(engine, folder)
    before, error = own_weights(step), ""
    add_up, norm = GradientStore.add_up, GradientStore.norm

    def scaled(store: GradientStore, ranks: Ranks) -> None:
        """Add gradients up; that of one weight is wrong before the ranks do so, or where each has its own after it."""
        weight = next(p for name, p in store.trained if name == "model.layers.1.mlp.experts.down_proj")
        ours, early = rank == 1 and store is step.gradients, engine == "whole" and fault == "one gradient"
        if ours and early:
            store.of(weight).mul_(1.5)
        add_up(store, ranks)
        if ours and fault == "no gradient":
            del store.collected[weight]
        elif ours and not early:
            store.of(weight).mul_(1.5)

    def stopping(store: GradientStore) -> float:
        return norm(store) if store is step.gradients else float("nan")

    with contextlib.ExitStack() as patched:
        if fault == "one draws" and rank:
            step.model.model.norm.register_forward_hook(lambda *_: (torch.rand(1), None)[1])
        if fault in ("one gradient", "no gradient", "one update"):
            patched.enter_context(mock.patch.object(GradientStore, "add_up", scaled))
        if fault == "one stops":
            patched.enter_context(mock.patch.object(GradientStore, "norm", stopping))
        try:
            step(*batches_of(0, rank, RANKS))
        except (VerificationError, ValueError, RankError) as raised:
            error = f"{type(raised).__name__}: {raised}"
    undone = all(map(torch.equal, before, own_weights(step)))
    return {"error": error, "undone": undone, "state": len(step.optimizer.state), "steps": step.steps}


def narrow(rank: int) -> str:
    """Return what is said where FSDP2 computes in bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    step = UnlearnStep(shard(sharded_child.model(), mp_policy=policy), recipe_of("graddiff sgd"), verify=1)
    step.prepare(*data())
    try:
        step(*batches_of(0, rank, RANKS))
    except ValueError as error:
        return str(error)
    return "none"


def found_by(rank: int, folder: Path) -> dict:
    """Verify the steps of every case, and those that have a fault; return reports and errors."""
    if rank == 0:
        sharded_child.model().save_pretrained(folder / "model")
    distributed.barrier()
    found: dict = {}
    for engine, names in NAMES.items():
        found |= {f"{engine} {name}": verified(engine, name, rank, folder) for name in names}
    for fault, engines in FAULTS.items():
        found |= {f"{engine} {fault}": spoilt(engine, fault, rank, folder) for engine in engines}
    found["narrow"] = narrow(rank)
    return found
