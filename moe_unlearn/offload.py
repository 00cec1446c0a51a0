"""Keeps what an optimizer holds of a parameter on the host, and brings it to the device in pieces for the update.

    for rows in pieces(held):                    # of one parameter: moments, and master weights if there are any
        with stage.brought({name: t[rows] for name, t in held.items()}) as there:
            update(..., there)                   # in place; what it left goes back to the host

A piece is some slices along dimension 0 of all that is held of one parameter, of at most `PIECE` bytes; a vector is not
cut, and one slice is the least. On the device lie two buffers, which serve all parameters in turn:

    bytes on the device = 2 * (bytes of the largest piece)       at most 512 MiB, but for slices larger than that

On CUDA the host's memory is pinned and one stream brings pieces while another takes them back. A piece waits for the
one before the last to leave its buffer, and an update for its own piece. So a copy overlaps with whatever the device
has to do before its update, such as the update of the piece before or a backward pass, both directions at once, and
the host waits for nothing. `settle` waits for it, before anybody else reads what lies on the host.

A copy changes no bit, and an update of slices has the bits of the update of all of them (`ops.masked_update`): results
are the same as without. Deterministic. Source: our specification; ZeRO-Offload (Ren et al., 2021) moves the update to
the host instead.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

PIECE = 1 << 28  # bytes of a piece, at most where it has several slices: 11 ms at 25 GB/s
_ALIGNED = 128  # float32 elements: how far apart tensors begin in a buffer, as from torch's CUDA allocator


def is_apart(device: torch.device) -> bool:
    """Return whether a device has a memory of its own, beside that of the host."""
    return device.type != "cpu"


def at_home(held: Tensor) -> Tensor:
    """Return what is held of a parameter as it lies on the host, pinned where there is CUDA; itself if it lies so."""
    held = held.cpu()
    pins = torch.cuda.is_available() and not isinstance(held, FakeTensor) and not held.is_pinned()
    return held.pin_memory() if pins else held


def check_alone(groups: Iterable[Mapping[str, Any]], *, shared: bool) -> None:
    """Raise ValueError for groups of an optimizer with `offload` where ranks share the weights out."""
    if shared and any(group["offload"] for group in groups):
        raise ValueError(
            "optimizer.offload needs whole weights on each rank; got weights that ranks share out: set "
            "optimizer.offload=false, since each rank holds only its part of the state, or run without FSDP2 and ep"
        )


def pieces(held: Mapping[str, Tensor]) -> Sequence[slice | EllipsisType]:
    """Return what goes to the device together: slices along dimension 0, or all at once."""
    tensors = [*held.values()]
    if sum(t.nbytes for t in tensors) <= PIECE or tensors[0].dim() < 2:
        return [...]
    count, each = len(tensors[0]), sum(t[:1].nbytes for t in tensors)
    size = max(PIECE // each, 1)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


@dataclass
class _Buffer:
    """One of the two buffers of a device: which of the host's memory it served last, and the event of its leaving."""

    memory: Tensor
    served: frozenset[int] = frozenset()
    left: torch.cuda.Event | None = None


class Stage:
    """The two buffers of one device and, where copies are `queued`, the streams for them; see the module."""

    def __init__(self, device: torch.device, *, queued: bool):
        self.device = device
        self._buffers = [_Buffer(torch.empty(0, device=device)) for _ in range(2)]
        self._in: torch.cuda.Stream | None = torch.cuda.Stream(device) if queued else None
        self._out: torch.cuda.Stream | None = torch.cuda.Stream(device) if queued else None

    @contextmanager
    def brought(self, held: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Yield a piece that lies on the host on the device, under its names; take back what the block left there."""
        self._buffers.reverse()
        buffer, other = self._buffers  # the other one has served the piece before
        if buffer.memory.numel() < (size := sum(map(_room, held.values()))):
            buffer.memory = buffer.memory[:0].clone()  # released before there is a larger one
            buffer.memory = self._made(size)
        there, start = {}, 0
        for name, own in held.items():
            room = buffer.memory[start : start + _room(own)].view(own.dtype)
            there[name], start = room[: own.numel()].view(own.shape), start + _room(own)
        served = frozenset(own.data_ptr() for own in held.values() if not isinstance(own, FakeTensor))
        here = None if self._in is None else torch.cuda.current_stream(self.device)
        for before in [buffer] if served.isdisjoint(other.served) else [buffer, other]:
            if self._in is not None and before.left is not None:
                self._in.wait_event(before.left)
        with torch.cuda.stream(self._in):
            for name, own in held.items():
                self._copy(there[name], own)
        _order(self._in, here)
        yield there
        _order(here, self._out)
        with torch.cuda.stream(self._out):
            for name, own in held.items():
                self._copy(own, there[name])
        buffer.served, buffer.left = served, None if self._out is None else self._out.record_event()

    def settle(self) -> None:
        """Wait until all that was taken back lies on the host."""
        if self._out is not None:
            self._out.synchronize()

    def _made(self, size: int) -> Tensor:
        """Make the memory of a buffer, of float32 elements, which the streams may use from now on."""
        memory = torch.empty(size, device=self.device)
        for stream in (self._in, self._out):
            if stream is not None:
                memory.record_stream(stream)
                stream.wait_stream(torch.cuda.current_stream(self.device))  # whose released memory this may be
        return memory

    @staticmethod
    def _copy(into: Tensor, source: Tensor) -> None:
        into.copy_(source, non_blocking=True)


def _room(own: Tensor) -> int:
    """Return the float32 elements that a tensor takes in a buffer."""
    return -(-own.nbytes // (4 * _ALIGNED)) * _ALIGNED


def _order(first: torch.cuda.Stream | None, second: torch.cuda.Stream | None) -> None:
    """Let what the second stream gets from now on wait for what the first one has."""
    if first is not None and second is not None:
        second.wait_stream(first)
