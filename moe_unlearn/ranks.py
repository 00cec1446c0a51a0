"""Ranks of torch.distributed that train one model together: each has all weights and its own rows.

    g = sum_r n_r g_r / sum_r n_r          g_r the gradient of a mean over the n_r positions or sequences of rank r

The ranks add up the step's own gradients, which are compact, so that only gradients of weights that train are sent. A
model need not be in torch's DistributedDataParallel, which takes memory for a gradient of every weight; if it is, the
wrapper's forward pass is not used and its hooks do nothing.

Every rank makes the same calls. Sums have the same bits on all ranks, and so have the weights after a step. An error
that one rank finds in its own arguments is raised on that rank alone, as everywhere in torch.distributed.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, distributed, nn


class Ranks:
    """The `count` ranks that share a model: those of `group`, else of its DistributedDataParallel, else one.

    All take the first rank's parameters and buffers. Raises ValueError for a model whose weights are sharded.
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
        """Return an object with the same count that does not communicate, for a rehearsal."""
        copied = object.__new__(Ranks)
        copied.group, copied.count = None, self.count
        return copied

    @property
    def first(self) -> bool:
        """Return whether this is the first rank, which writes files."""
        return self.group is None or distributed.get_rank(self.group) == 0

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return the elementwise sums of all ranks' values; a sum is not finite where a value is not."""
        if self.group is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        self._in_place(total, distributed.all_reduce)
        return total.tolist()

    def add_(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Add up all ranks' gradients in place, by the name of their parameter.

        Raises RuntimeError on all ranks if only some of them have a gradient.
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
        """Copy the first rank's tensors into those of all ranks, which have the same shapes."""
        if self.group is not None:
            for tensor in tensors:
                self._in_place(tensor, lambda t, group: distributed.broadcast(t, group=group, group_src=0))

    def agree(self, what: str, value: Callable[[], object]) -> None:
        """Raise ValueError on all ranks unless their JSON values are equal; `what` names the value in the message."""
        if self.group is None:
            return
        values = gather(value(), self.group)
        if any(other != values[0] for other in values):
            raise ValueError(f"expected {what} to be the same on all {self.count} ranks; they differ")

    def _in_place(self, tensor: Tensor, exchange: Callable) -> None:
        # collectives need contiguous memory, and those of NCCL need it on the GPU
        sent = tensor.to(_device(self.group, tensor.device)).contiguous()
        exchange(sent, group=self.group)
        if sent is not tensor:
            tensor.copy_(sent)


def local(model: nn.Module) -> nn.Module:
    """Return the model inside data-parallel wrappers, whose forward pass would wait for the other ranks."""
    while isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return model


def sharded(model: nn.Module) -> bool:
    """Return whether weights are split over ranks, so that every rank must take part in every forward pass."""
    if not initialised():
        return False
    # imported here because a single process never needs them and they are slow to import
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    return any(isinstance(m, FullyShardedDataParallel) for m in model.modules()) or any(
        isinstance(p, DTensor) for p in model.parameters()
    )


def gather(value: object, group: "distributed.ProcessGroup | None" = None) -> list:
    """Return the JSON values of all ranks, in their order; floats keep every bit."""
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
    """Return whether this process is a rank of torch.distributed."""
    return distributed.is_available() and distributed.is_initialized()


def _device(group: "distributed.ProcessGroup | None", preferred: torch.device) -> torch.device:
    """Return the device on which the backend of `group` takes tensors: `preferred` if it can be used."""
    if distributed.get_backend(group) == "nccl" and preferred.type != "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return preferred
