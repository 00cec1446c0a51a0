"""Four ranks make steps in float64: transformers shares out the experts, or FSDP2 replicas."""

from pathlib import Path
from unittest import mock

import peft
import torch
from safetensors.torch import save_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers.distributed import DistributedConfig

from moe_unlearn.errors import NonFiniteError
from moe_unlearn.model.capture import routing_capture
from moe_unlearn.model.head import final_hidden_states
from moe_unlearn.plan import ways
from moe_unlearn.step import UnlearnStep, factors, gradients, sinks
from tests.support import sharded_child
from tests.support.sharded_child import CASES, STEPS, UNSENT, batches_of, masks_of, shard, step_of, weights_of
from tests.support.steps import data, made_of, recipe

EP, RANKS = 2, 4
OWN = [name for name, (_, _, asked) in CASES.items() if "family" not in asked]
FEW = ["graddiff sgd", "trace", "combined"]
# the cases of each engine: each objective and each road once, and what repeats them
NAMES = {
    "ep 2 x efsdp 2": ["graddiff clip", "npo", "trace", "wagle npo", "mollm", "combined", "update"],
    "ep 4": ["combined", "update", "update adamw", "factors trace"],
    "replicas": ["combined"],
}
ALL = {"ep 2 x efsdp 2": [*OWN, "update"], "ep 4": [*FEW, *UNSENT], "replicas": FEW}
MORE = {engine: [name for name in names if name not in NAMES[engine]] for engine, names in ALL.items()}
# experts on one rank each, and on two that share them out
ENGINES = {"ep 2 x efsdp 2": EP, "ep 4": RANKS}


def replicated() -> nn.Module:
    """The model of the cases, shared out over two ranks, twice."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "fsdp"))
    return shard(sharded_child.model().double(), mesh=mesh)


def loaded(folder: Path, ep: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model of the cases, its experts shared out."""
    family = type(sharded_child.model())
    config = DistributedConfig(fsdp_size=RANKS, ep_size=ep)
    made = family.from_pretrained(
        folder / "model", distributed_config=config, dtype=dtype, experts_implementation="moe_unlearn"
    )
    return made.eval()


def counts(model: nn.Module) -> list:
    with torch.no_grad(), routing_capture(model) as capture:
        final_hidden_states(model, data()[0][0])
    return capture.counts.tolist()


def halving(folder: Path, ep: int, rank: int) -> dict:
    """The engine's own gradient of an expert weight, as torch and transformers leave it to a plain training loop."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        made = loaded(folder, ep, dtype)
        forget = data()[0][0]
        made(
            input_ids=forget["input_ids"], attention_mask=forget["attention_mask"], labels=forget["labels"]
        ).loss.backward()
        weight = dict(made.named_parameters())["model.layers.0.mlp.experts.down_proj"]
        found[str(dtype)] = float(weight.grad.full_tensor().double().norm())
    return found


def planned(folder: Path) -> str:
    """Return what is said of a plan of a model that is sharded already."""
    try:
        UnlearnStep(loaded(folder, EP), recipe("graddiff")).plan(*data())
    except ValueError as error:
        return str(error)
    return "none"


def stopped(folder: Path, rank: int, name: str) -> list:
    """Return what all ranks have where the factors of one are not finite: an error, what moved, the next loss."""
    step, largest = step_of(loaded(folder, RANKS), name), factors.largest_sum

    def restored() -> str:
        step.rewind(0, step.objectives.dual.value, None)
        return "all is restored"

    step.restore = restored
    before = weights_of(step)
    spoilt = mock.Mock(side_effect=lambda f: largest(f) + float("inf" if rank == 1 else 0))
    error = "none"
    with (
        mock.patch.object(sinks, "largest_sum", spoilt),
        mock.patch.object(gradients, "largest_sum", spoilt),
        mock.patch.object(ways, "form", return_value="factors"),
    ):
        try:
            step(*batches_of(0, rank, RANKS))
        except NonFiniteError as raised:
            error = str(raised)
    moved = sorted(key for key, value in weights_of(step).items() if not torch.equal(value, before[key]))
    return [error, moved, step(*batches_of(0, rank, RANKS))["forget_loss"]]


def adapted(folder: Path) -> str:
    """Return what is said of adapters on the weights of experts that are shared out."""
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=experts)
    try:
        UnlearnStep(peft.get_peft_model(loaded(folder, RANKS), settings), recipe("graddiff"))
    except ValueError as error:
        return str(error)
    return "none"


def steps_of(model: nn.Module, case: str, name: str, rank: int, folder: Path) -> list:
    """Make the steps of a case and write the weights; return their obstacle and metrics."""
    step = step_of(model, name)
    obstacle = step.obstacle
    metrics = [made_of(step, [batches_of(i, rank, RANKS)]) for i in range(STEPS)]
    after = weights_of(step) | masks_of(step)
    if rank == 0:
        save_file(after, folder / f"{case}.safetensors")
    return [obstacle, *metrics]


def made_by(rank: int, folder: Path, names: dict[str, list[str]]) -> dict:
    """Make the steps of the cases of each engine; return obstacles and metrics."""
    if rank == 0:
        sharded_child.model().save_pretrained(folder / "model")
    distributed.barrier()
    found = {}
    for engine, own in names.items():
        for name in own:
            made, case = loaded(folder, ENGINES[engine]) if engine in ENGINES else replicated(), f"{engine} {name}"
            found[case] = steps_of(made, case, name, rank, folder)
    return found


def found_by(rank: int, folder: Path) -> dict:
    """Make the steps of the usual cases, and what else ranks with experts of their own meet; return what came of it."""
    found = made_by(rank, folder, NAMES)
    found |= {"halving": {engine: halving(folder, ep, rank) for engine, ep in ENGINES.items()}}
    found["stopped"] = {name: stopped(folder, rank, name) for name in ("graddiff sgd", "update")}
    found |= {"planned": planned(folder), "adapted": adapted(folder)}
    return found | {f"{engine} counts": counts(loaded(folder, ep)) for engine, ep in ENGINES.items()}
