"""Four ranks save and resume a model and its optimizer under several engines.

Every engine makes the update that one process makes: it is elementwise, and so is the gradient here.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import OlmoeForCausalLM
from transformers.distributed import DistributedConfig

from moe_unlearn.checkpoint import sharded
from moe_unlearn.checkpoint.optimizer import from_tree, part_of, to_tree
from moe_unlearn.checkpoint.sharded import CheckpointError, Part, Slices
from moe_unlearn.model.saving import save_pretrained
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.optim import MaskedAdamW
from tests.support.models import tiny_olmoe

RANKS = 4
OLD = "step-00000001"  # of one process, in its own format
# from the checkpoint of one engine to the ranks of another: (checkpoint, engine)
RESUMED = [("fsdp2", "fsdp3"), ("ep4", "fsdp2"), ("one", "ep4"), (OLD, "fsdp3")]


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return tiny_olmoe(implementation="grouped_mm").eval()


def masks(whole: nn.Module) -> dict[str, Tensor]:
    """Packed masks by name of the parameter: some experts, scattered rows, any weights."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for name, p in whole.named_parameters():
        kept = torch.zeros(p.shape, dtype=torch.bool)
        if "experts.gate_up" in name:
            kept[[1, 2, 5]] = True
        elif "experts.down" in name:
            kept[[6]] = True  # on the last ranks alone
        elif "lm_head" in name:
            kept[torch.rand(len(p), generator=generator) < 0.4] = True
        elif "k_proj" in name:
            pass  # frozen
        elif "q_proj" in name:
            kept = torch.rand(p.shape, generator=generator) < 0.5
        else:
            continue
        found[name] = pack_bits(kept)
    return found


def trained() -> list[str]:
    """The names of the parameters that have a state on some rank."""
    return [name for name, _ in tiny_olmoe().named_parameters() if "k_proj" not in name]


class Trained:
    """A model and its optimizer, as an engine holds them."""

    def __init__(self, model: nn.Module, *, numerics: str = "parity"):
        self.model, self.parameters = model, dict(model.named_parameters())
        self.optimizer = MaskedAdamW(self.parameters.values(), lr=1e-2, weight_decay=0.1, numerics=numerics)
        words = masks(tiny_olmoe())
        held = {name: part_of(p) for name, p in self.parameters.items()}
        self.optimizer.set_masks(
            [words[name][rows.start : rows.stop] if name in words else None for name, rows in held.items()]
        )

    def step(self) -> None:
        for p in self.parameters.values():
            p.grad = p.detach() * 0.5 + 0.125
        self.optimizer.step()

    def moments(self) -> dict:
        return {name: self.optimizer.state[p] for name, p in self.parameters.items() if self.optimizer.state.get(p)}

    def state(self) -> dict:
        moments = {name: to_tree(state, part_of(self.parameters[name])) for name, state in self.moments().items()}
        return {"model": self.model.state_dict(), "optimizer": moments, "run": {"steps": 1, "nan": float("nan")}}

    def load(self, folder: Path, group: object = None) -> None:
        rows, into = {name: part_of(p) for name, p in self.parameters.items()}, {"model": self.model.state_dict()}
        if folder.name != OLD:
            into["optimizer"] = {name: rows[name] for name in trained()}
        found = sharded.load(folder, into, group=group)
        for name, p in self.parameters.items():
            state = found["optimizer"].get(name, {})
            if folder.name == OLD:  # the slices that train, and which they are
                state = to_tree(state, Part(0, rows[name].count, rows[name].count))
            self.optimizer.state[p] = from_tree(state, rows[name])
        assert found["run"]["steps"] == 1


class Engines:
    """Makes a model of given weights under an engine, on the ranks that it has; None on others."""

    def __init__(self, folder: Path, rank: int):
        self.folder, self.rank = folder, rank
        self.meshes = {n: DeviceMesh("cpu", list(range(n))) for n in (2, 3)}
        self.groups = {n: mesh.get_group() if rank < n else None for n, mesh in self.meshes.items()}

    def __call__(self, engine: str, seed: int) -> tuple[Trained, object] | None:
        if engine == "ep4":
            settings = DistributedConfig(fsdp_size=RANKS, ep_size=2)
            made = OlmoeForCausalLM.from_pretrained(self.folder / f"seed{seed}", distributed_config=settings).eval()
            return Trained(made), None
        count = int(engine.removeprefix("fsdp"))
        if self.rank >= count:
            return None
        made = model(seed)
        for layer in made.model.layers:
            fully_shard(layer, mesh=self.meshes[count])
        return Trained(fully_shard(made, mesh=self.meshes[count])), self.groups[count]


def message(function: Callable[[], object]) -> str:
    """The message of the CheckpointError or TypeError that a call raises."""
    try:
        function()
    except (CheckpointError, TypeError) as error:
        return str(error)
    return "nothing"


def misused(rank: int, folder: Path) -> dict:
    """Return what is said of trees that would lose something, on every rank of all four."""
    own = torch.full((2, 3), float(rank))
    found = {"plain": message(lambda: sharded.save(folder / "bad", {"m": own}))}
    found["json"] = message(lambda: sharded.save(folder / "bad", {"here": {"n": rank}}))
    found["type"] = message(lambda: sharded.save(folder / "bad", {"n": {1} if rank == 2 else 1}))
    runs = Slices(torch.arange(rank, rank + 2), own, 6)
    found["runs"] = message(lambda: sharded.save(folder / "bad", {"m": runs}))
    sharded.save(folder / "good", {"m": Slices(torch.tensor([rank * 2, rank * 2 + 1]), own, 8)})
    mesh = DeviceMesh("cpu", list(range(RANKS)))
    mixed = DTensor.from_local(own, mesh, [_StridedShard(0, split_factor=2)], run_check=False)
    found["placement"] = message(lambda: sharded.save(folder / "bad", {"m": mixed}))
    wrong = {"m": Part(0, 8, 9 if rank == 3 else 8)}
    found["target"] = message(lambda: sharded.load(folder / "good", wrong))
    found["kept"] = sharded.load(folder / "good", {"m": Part(0, 8, 8)})["m"].values[:, 0].tolist()
    if rank == 1:
        (folder / "good" / "rank-00002.safetensors").write_bytes(b"")
    distributed.barrier()
    found["damaged"] = message(lambda: sharded.load(folder / "good"))
    found["left"] = sorted(path.name for path in folder.glob("*bad*"))
    return found


def replicas(rank: int, folder: Path) -> bool:
    """Whether what two pairs of ranks hold alike, sharded in each, comes back sharded over all four."""
    whole, made = torch.arange(6.0).view(2, 3), []  # more ranks than rows, or columns
    for mesh, placements in (
        (DeviceMesh("cpu", [[0, 1], [2, 3]]), [Replicate(), Shard(0)]),
        (DeviceMesh("cpu", [0, 1, 2, 3]), [Shard(1)]),
        (DeviceMesh("cpu", [0, 1, 2, 3]), [Shard(0)]),
    ):
        made.append(distribute_tensor(whole, mesh, placements))
        sharded.save(folder / f"replicas{len(made)}", {"t": made[-1]})
    for i, target in enumerate([made[1], made[2], made[0]]):
        target.to_local().zero_()
        sharded.load(folder / f"replicas{i + 1}", {"t": target})
        if not torch.equal(target.full_tensor(), whole):
            return False
    return True


def lost(rank: int, folder: Path) -> list[float]:
    """Return what torch's own storage gives back of tensors that differ from rank to rank under one name."""
    state = {"m": torch.full((2,), float(rank))}
    torch_checkpoint.save(state, checkpoint_id=str(folder / "torch"))
    torch_checkpoint.load(state, checkpoint_id=str(folder / "torch"))
    return state["m"].tolist()


def refused(*_: object, **__: object) -> None:
    raise AssertionError("a pickle is written or read")


def of_torch(engines: Engines, folder: Path) -> bool:
    """Whether AdamW of torch, saved on two ranks, has the same DTensors on three."""
    made = {}
    for count, mesh in engines.meshes.items():
        layer = nn.Linear(3, 10, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.arange(30.0).view(10, 3))
        if engines.rank < count:
            fully_shard(layer, mesh=mesh)
            optimizer = torch.optim.AdamW(layer.parameters())
            layer.weight.grad = layer.weight.detach() * 0.5
            optimizer.step()
            made[count] = dict(optimizer.state[layer.weight])
    if engines.rank < 2:
        sharded.save(folder / "torchs", made[2], group=engines.groups[2])
    distributed.barrier()
    if engines.rank == 3:
        return True
    before = [t.to_local().clone() for t in (made[3]["exp_avg"], made[3]["exp_avg_sq"])]
    for name in ("exp_avg", "exp_avg_sq"):
        made[3][name].to_local().zero_()
    found = sharded.load(folder / "torchs", made[3], group=engines.groups[3])
    after = [t.to_local() for t in (found["exp_avg"], found["exp_avg_sq"])]
    return all(torch.equal(a, b) and b.any() for a, b in zip(after, before, strict=True) if len(b))


def found_by(rank: int, folder: Path) -> dict:
    """Save, resume and save the model again; return what was said of misuse, and what came back."""
    found = {"lost": lost(rank, folder)}
    torch.save = torch.load = refused
    found["misused"] = misused(rank, folder)
    found["replicas"] = replicas(rank, folder)
    engines = Engines(folder, rank)
    found["of_torch"] = of_torch(engines, folder)
    for engine in ("fsdp2", "ep4"):
        if (made := engines(engine, 0)) is not None:
            trained, group = made
            trained.step()
            sharded.save(folder / engine, trained.state(), group=group)
    distributed.barrier()
    for saved, engine in RESUMED:
        if (made := engines(engine, 1)) is not None:
            trained, group = made
            trained.load(folder / saved, group)
            trained.step()
            out = folder / "hub" / f"{saved}-{engine}"
            save_pretrained(trained.model, out, max_shard_size="40KB", group=group)
    distributed.barrier()
    return found
