"""Mesh, the sizes of a mesh of ranks that need not exist, and what a model must be like to lie on it."""

import math
import re
from dataclasses import dataclass

from torch import Tensor, nn

from moe_unlearn.experts import experts_modules
from moe_unlearn.sharding import EXPERTS, Placing, is_sharded, placing_of

_EXPECTED = "expected a mesh such as fsdp=8 or fsdp=8,ep=4"


@dataclass(frozen=True)
class Mesh:
    """Sizes of a mesh, as transformers' DistributedConfig(fsdp_size=..., ep_size=...) has them.

    fsdp: the number of ranks; each has batches of its own, and together they hold the weights. ep: how many of them
    share out the experts of a layer; the `fsdp / ep` ranks that have the same experts share out their rows.

    Raises ValueError for sizes below 1, and for an `ep` that does not divide `fsdp`.
    """

    fsdp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for name, size in (("fsdp", self.fsdp), ("ep", self.ep)):
            if size < 1:
                raise ValueError(f"{_EXPECTED}, with sizes of at least 1; got {name}={size}")
        if self.fsdp % self.ep:
            raise ValueError(
                f"{_EXPECTED}, where ep divides fsdp, the number of all ranks; got fsdp={self.fsdp} and ep={self.ep}"
            )

    @classmethod
    def parse(cls, text: str) -> "Mesh":
        """Parse `fsdp=4,ep=2`; ValueError, which says what was expected, for anything else."""
        sizes: dict[str, int] = {}
        for part in text.split(","):
            found = re.fullmatch(r"\s*(\w+)\s*=\s*(-?\w*)\s*", part)
            if found is None:
                raise ValueError(f"{_EXPECTED}; got {text!r}")
            name, value = found.groups()
            if name not in ("fsdp", "ep"):
                raise ValueError(f"{_EXPECTED}: its dimensions are fsdp and ep; got {name!r}")
            if name in sizes:
                raise ValueError(f"{_EXPECTED}; got {name} twice in {text!r}")
            if not re.fullmatch(r"-?[0-9]+", value):
                raise ValueError(f"{_EXPECTED}, with whole numbers; got {name}={value}")
            sizes[name] = int(value)
        return cls(**sizes)

    @property
    def peers(self) -> int:
        """Return how many ranks have the same experts, and add up their gradients."""
        return self.fsdp // self.ep

    def __str__(self) -> str:
        sizes = f"fsdp {self.fsdp}" + (f", ep {self.ep}" if self.ep > 1 else "")
        return f"{self.fsdp} ranks ({sizes})"

    def placings(self, model: nn.Module) -> dict[Tensor, Placing]:
        """Return where each parameter of a model would lie.

        Raises ValueError for layers whose number of experts `ep` does not divide.
        """
        everywhere, of_experts = Placing.fsdp(self.fsdp), Placing.experts(self.ep, self.peers)
        placings: dict[Tensor, Placing] = dict.fromkeys(model.parameters(), everywhere)
        for name, p in model.named_parameters():
            if p.dim() == 0:
                raise ValueError(f"{name} is a scalar, which has no rows that {self} could share out")
        for name, module in experts_modules(model).items() if self.ep > 1 else ():
            for suffix, p in module.named_parameters():
                if len(p) % self.ep:
                    raise ValueError(
                        f"{name}.{suffix} has {len(p)} experts, which ep={self.ep} ranks cannot share out evenly"
                    )
                placings[p] = of_experts
        return placings

    def padding(self, model: nn.Module) -> str:
        """Return a note on the rows that ranks gather and reduce though no weight has them; empty if they are few."""
        placings, added, most = self.placings(model), 0, ("", 0, 0, 0)
        for name, p in model.named_parameters():
            first = placings[p].coordinates()[0]
            rows, ranks = len(placings[p].seen(len(p), first)), len(placings[p].peers(first))
            extra = (-rows % ranks) * p[:1].nbytes * (len(p) // max(rows, 1))
            added, most = added + extra, max(most, (name, rows, ranks, extra), key=lambda found: found[3])
        share = added / max(sum(p.nbytes for p in placings), 1)
        if share < 0.05:
            return ""
        return (
            f"{most[0]} has {most[1]} rows for {most[2]} ranks: parts are equally long, so that what is gathered and "
            f"reduced is {share:.0%} more than the weights"
        )


def mesh_of(model: nn.Module) -> Mesh | None:
    """Return the mesh of the ranks that share out a model's weights; None if every weight is whole."""
    placings = [placing_of(name, p) for name, p in model.named_parameters() if is_sharded(p)]
    if not placings:
        return None
    fsdp = max(math.prod(n for n, split in zip(p.sizes, p.splits, strict=True) if split) for p in placings)
    ep = max(n for p in placings for n, name in (*zip(p.sizes, p.names, strict=True), (1, EXPERTS)) if name == EXPERTS)
    return Mesh(fsdp, ep)


def check_whole(model: nn.Module) -> None:
    """Raise ValueError for a model that is sharded already; it names the mesh with which whole weights are planned."""
    mesh = mesh_of(model)
    if mesh is not None:
        text = f"fsdp={mesh.fsdp}" + (f",ep={mesh.ep}" if mesh.ep > 1 else "")
        raise ValueError(
            "expected a model with whole weights to plan for; got one that is sharded already: plan a step on the "
            f"model as it was before that, or on the meta device, with mesh={text!r}"
        )
