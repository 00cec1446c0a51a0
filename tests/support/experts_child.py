"""One of four ranks over which transformers shares out a model's experts, or FSDP2 its replicas, in float64."""

import json
import sys
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
from tests.support.two_ranks import join

EP, RANKS = 2, 4
OWN = [name for name, (_, _, asked) in CASES.items() if "family" not in asked]
FEW = ("graddiff sgd", "trace", "combined")
# the cases of each engine
NAMES = {"ep 2 x efsdp 2": [*OWN, "update"], "ep 4": [*FEW, *UNSENT], "replicas": list(FEW)}
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
    """What is said of a plan of a model that is sharded already."""
    try:
        UnlearnStep(loaded(folder, EP), recipe("graddiff")).plan(*data())
    except ValueError as error:
        return str(error)
    return "none"


def stopped(folder: Path, rank: int, name: str) -> list:
    """What ends on all ranks where the factors of one of them are not finite: the error, what moved, the next loss."""
    step, largest = step_of(loaded(folder, RANKS), name), factors.largest_sum
    step.restore = lambda: "all is restored"
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
    """What is said of adapters on the weights of experts that are shared out."""
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


def main(rank: int, folder: Path) -> None:
    join(rank, folder)
    if rank == 0:
        sharded_child.model().save_pretrained(folder / "model")
    distributed.barrier()
    found: dict = {"halving": {engine: halving(folder, ep, rank) for engine, ep in ENGINES.items()}}
    found["stopped"] = {name: stopped(folder, rank, name) for name in ("graddiff sgd", "update")}
    found |= {"planned": planned(folder), "adapted": adapted(folder)}
    for engine, ep in ENGINES.items():
        found[f"{engine} counts"] = counts(loaded(folder, ep))
        for name in NAMES[engine]:
            case = f"{engine} {name}"
            found[case] = steps_of(loaded(folder, ep), case, name, rank, folder)
    for name in NAMES["replicas"]:
        found[f"replicas {name}"] = steps_of(replicated(), f"replicas {name}", name, rank, folder)
    (folder / f"rank{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
