"""The ranks of torch.distributed that train one model: each has all weights, and rows of its own.

    g = sum_r n_r g_r / sum_r n_r          g_r the gradient of a mean over the n_r positions or sequences of rank r

What the ranks add up are the step's own gradients, compact, so that only what trains is sent. A model need not be in
torch's DistributedDataParallel, which takes memory for a gradient of every weight; if it is, the wrapper's forward pass
is not used, and its hooks rest.

Every rank makes the same calls. Sums are the same bits on all of them, and so are the weights after a step. What one
rank alone finds wrong with its own arguments it raises alone, as everywhere in torch.distributed.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, distributed, nn


class Ranks:
    """The ranks that share a model, `count` of them: those of `group`, else of its DistributedDataParallel, else one.

    All take the first one's parameters and buffers. Raises ValueError for a model whose weights are sharded.
    """

    def __init__(self, model: nn.Module, group: "distributed.ProcessGroup | None" = None):
        if sharded(model):
            raise ValueError(
                "expected all weights on every rank; got a model whose weights are sharded (FSDP): leave it whole"
            )
        if group is None and isinstance(model, nn.parallel.DistributedDataParallel):
            group = model.process_group
        self.group = group
        self.count = 1 if self.group is None else distributed.get_world_size(self.group)
        self.share_(tensor.detach() for tensor in (*model.parameters(), *model.buffers()))

    def __deepcopy__(self, memo: dict) -> "Ranks":
        """As many ranks, none of which is spoken to: for a rehearsal."""
        copied = object.__new__(Ranks)
        copied.group, copied.count = None, self.count
        return copied

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.group is None or distributed.get_rank(self.group) == 0

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sums of every rank's values, one by one; not finite where one of them is not."""
        if self.group is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        self._in_place(total, distributed.all_reduce)
        return total.tolist()

    def add_(self, gradients: Mapping[str, Tensor | None]) -> None:
        """The sum of every rank's gradients, in place, by the name of their parameter.

        Raises RuntimeError on all ranks if some have a gradient that others have not.
        """
        if self.group is None:
            return
        present = torch.tensor([g is not None for g in gradients.values()], dtype=torch.int32)
        self._in_place(present, distributed.all_reduce)
        for (name, gradient), holders in zip(gradients.items(), present.tolist(), strict=True):
            if holders not in (0, self.count):
                raise RuntimeError(f"the gradient of {name}: expected it on all {self.count} ranks; {holders} have one")
            if gradient is not None:
                self._in_place(gradient, distributed.all_reduce)

    def share_(self, tensors: Iterable[Tensor]) -> None:
        """The first rank's tensors, in place, on all of them; each has the same shapes."""
        if self.group is not None:
            for tensor in tensors:
                self._in_place(tensor, lambda t, group: distributed.broadcast(t, group=group, group_src=0))

    def agree(self, what: str, value: Callable[[], object]) -> None:
        """Raise ValueError on all ranks unless they have the same JSON value."""
        if self.group is None:
            return
        values = gather(value(), self.group)
        if any(other != values[0] for other in values):
            raise ValueError(f"expected {what} to be the same on all {self.count} ranks; they differ")

    def _in_place(self, tensor: Tensor, exchange: Callable) -> None:
        # collectives take memory without gaps, NCCL's on its own device
        sent = tensor.to(_device(self.group, tensor.device)).contiguous()
        exchange(sent, group=self.group)
        if sent is not tensor:
            tensor.copy_(sent)


def local(model: nn.Module) -> nn.Module:
    """The model inside data-parallel wrappers, whose forward pass would wait for the other ranks."""
    while isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return model


def sharded(model: nn.Module) -> bool:
    """Whether no rank holds all weights, so that every rank must take part in every forward pass."""
    if not initialised():
        return False
    # imported here: one process never needs them, and they are slow to import
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    return any(isinstance(m, FullyShardedDataParallel) for m in model.modules()) or any(
        isinstance(p, DTensor) for p in model.parameters()
    )


def gather(value: object, group: "distributed.ProcessGroup | None" = None) -> list:
    """The JSON value of every rank, in their order; floats come back bit for bit."""
    if not initialised():
        return [value]
    device = _device(group, torch.device("cpu"))
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    length = torch.tensor([len(data)], device=device)
    lengths = [torch.empty_like(length) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(lengths, length, group=group)
    longest = int(max(lengths))
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(data)] = data
    bodies = [torch.empty_like(padded) for _ in lengths]
    distributed.all_gather(bodies, padded, group=group)
    return [json.loads(bytes(b[: int(n)].cpu().numpy())) for b, n in zip(bodies, lengths, strict=True)]


def initialised() -> bool:
    """Whether this process is a rank of torch.distributed."""
    return distributed.is_available() and distributed.is_initialized()


def _device(group: "distributed.ProcessGroup | None", preferred: torch.device) -> torch.device:
    """Where the backend of `group` takes tensors: `preferred`, if it can."""
    if distributed.get_backend(group) == "nccl" and preferred.type != "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return preferred
