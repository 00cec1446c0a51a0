"""Four ranks measure what torch's FSDP2 and transformers' expert parallelism hold and send in a step."""

from pathlib import Path

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.distributed import DistributedConfig

from moe_unlearn.experts import enable
from moe_unlearn.model.states import decoder_layers
from moe_unlearn.plan.memory import measured_peak
from moe_unlearn.plan.mesh import Mesh
from moe_unlearn.prepare.preparation import Preparation
from moe_unlearn.sharding import as_forward
from moe_unlearn.step.objectives import Objectives
from moe_unlearn.step.weights import build_optimizer
from tests.support.meshes import CASES, RANKS, batches, model_of, recipe


class Sent(TorchDispatchMode):
    """Counts the bytes that go to other ranks; an all_to_all sends some of them from place `place` of `peers`."""

    def __init__(self, place: int, peers: int):
        super().__init__()
        self.place, self.peers, self.total, self.exchanged = place, peers, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.replace("_", "")
        if name.startswith("c10d") and not name.endswith(("waittensor", "wraptensorautograd")):
            self.count(name, args)
        return function(*args, **(kwargs or {}))

    def count(self, name, args):
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if "alltoall" in name:
            source, (_, given) = tensors[-1], [a for a in args if isinstance(a, list)]
            given = given or [len(source) // self.peers] * self.peers
            size = (sum(given) - given[self.place]) * source[:1].nbytes
            self.exchanged += size
        elif "allgatherbase" in name:
            size = tensors[0].nbytes - tensors[1].nbytes
        elif "reducescatterbase" in name:
            size = tensors[1].nbytes - tensors[0].nbytes
        else:
            raise AssertionError(f"{name} is not expected here")
        self.total += size


def engine(name: str, folder: Path) -> torch.nn.Module:
    """The model of a case as its engine shares it out; a case of two ranks runs in two pairs."""
    mesh, model = Mesh.parse(CASES[name].mesh), model_of(name)
    if CASES[name].native:
        sizes = DistributedConfig(fsdp_size=mesh.fsdp, ep_size=mesh.ep)
        return type(model).from_pretrained(folder / name, distributed_config=sizes).eval()
    pairs = init_device_mesh("cpu", (RANKS // mesh.fsdp, mesh.fsdp), mesh_dim_names=("apart", "fsdp"))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=pairs["fsdp"])
    return fully_shard(model, mesh=pairs["fsdp"])


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def measure(name: str, folder: Path) -> dict[str, float]:
    model = engine(name, folder)
    enable(model)
    optimizer = build_optimizer(model, recipe())
    objectives, pair = Objectives(model, recipe(), Preparation()), batches()
    # as a step makes it: one forward pass, in which FSDP2 keeps the root whole and notes the order of its layers
    losses = as_forward(model, objectives)

    def step() -> None:
        values = losses(*pair, joint=False)
        sum(objectives.factors[loss] * value for loss, value in values.items()).backward()
        optimizer.step()
        optimizer.zero_grad()

    ep = Mesh.parse(CASES[name].mesh).ep
    step()
    with Sent(distributed.get_rank() % ep, ep) as sent:
        step()
    peaks = []
    for _ in range(3):
        with measured_peak("cpu") as measured:
            step()
        peaks.append(measured.peak)
    state = [value for values in optimizer.state.values() for value in values.values()]
    return {
        "weights": sum(local(p).nbytes for p in model.parameters()),
        "buffers": sum(b.nbytes for b in model.buffers()),
        "optimizer state": sum(local(value).nbytes for value in state),
        # a buffer that gloo's own thread is the last to release is never seen to be released
        "peak": min(peaks),
        "sent": sent.total,
        "exchanged": sent.exchanged,
    }


def found_by(folder: Path) -> dict[str, dict[str, float]]:
    return {name: measure(name, folder) for name in CASES}
