"""Memory by component: a ledger of predicted allocations, and a measurement of the peak of actual ones."""

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.profiler import profile

TRANSIENT = ("activations", "workspace")
HOST = "on the host"  # a component that takes none of the device's memory
_CUDA_BLOCK = 512  # bytes to which torch's CUDA allocator rounds


class Ledger:
    """Record of allocations and releases of tensors, real or fake, in order; each belongs to a component.

    On a CUDA `device` sizes are rounded up as torch's allocator does. The component of a storage may become known
    later: `label` changes it for the storage's whole lifetime.
    """

    def __init__(self, device: torch.device):
        self._block = _CUDA_BLOCK if device.type == "cuda" else 1
        self._events: list[tuple[int, int]] = []  # (key, bytes), negative where released
        self._held: dict[int, int] = defaultdict(int)  # key -> bytes held now
        self._components: list[str] = []  # by key
        self._live: dict[int, int] = {}  # address of a storage -> key
        self._replacement: tuple[int, int, int, int] | None = None  # (old key, new key, new address, bytes)

    def add(self, tensor: Tensor, component: str) -> None:
        """Count the storage of `tensor` until it is released; do nothing if it is counted already."""
        self._settle()
        if (registered := self._register(tensor, component)) is not None:
            key, _, size = registered
            self._record(key, size)

    def hold(self, size: int, component: str) -> int:
        """Count `size` bytes until `let_go` of the key that is returned."""
        self._settle()
        key = self._key(component)
        self._record(key, size)
        return key

    def let_go(self, key: int) -> None:
        """Count what `hold` returned this key for as released."""
        self._settle()
        self._record(key, -self._held[key])

    def pulse(self, size: int, component: str) -> None:
        """Count `size` bytes that are allocated and released at once, such as those that a kernel uses inside."""
        if size:  # else a pending replacement stays one
            self.let_go(self.hold(size, component))

    def leave_out(self, tensor: Tensor) -> None:
        """Never count the storage of `tensor`, which outlives the ledger: `hold` counts what it stands for."""
        self._live[tensor.untyped_storage()._cdata] = self._key("")

    def resize(self, tensor: Tensor, size: int) -> None:
        """Count the storage of `tensor`, where it is counted, as `size` bytes from now on."""
        self._settle()
        key = self._live.get(tensor.untyped_storage()._cdata)
        if key is not None:
            self._record(key, size - self._held[key])

    def replace(self, old: Tensor, new: Tensor, component: str) -> None:
        """Let `new` take over the memory of `old` if `old` is released before anything else is allocated."""
        self._settle()
        key = self._live.get(old.untyped_storage()._cdata)
        registered = self._register(new, component)
        if key is not None and registered is not None:
            self._replacement = key, *registered
        elif registered is not None:
            self._record(registered[0], registered[2])

    def label(self, tensors: Iterable[Tensor], component: str) -> None:
        """Count `tensors` that were allocated as activations or workspace as `component` from their start."""
        self._settle()
        for tensor in tensors:
            key = self._live.get(tensor.untyped_storage()._cdata)
            if key is not None and self._components[key] in TRANSIENT:
                self._components[key] = component

    def peak(self) -> dict[str, int]:
        """Return the bytes by component at the moment when their sum is largest."""
        events = self.timeline()
        total = most = at = 0
        for i, (_, size) in enumerate(events, 1):
            total += size
            if total > most:
                most, at = total, i
        held: dict[str, int] = defaultdict(int)
        for name, size in events[:at]:
            held[name] += size
        return {name: size for name, size in held.items() if size}

    def timeline(self) -> list[tuple[str, int]]:
        """Return the component and the bytes of each event on the device in order, negative where released."""
        self._settle()
        named = ((self._components[key], size) for key, size in self._events)
        return [event for event in named if event[0] != HOST]

    def largest(self) -> dict[str, int]:
        """Return the most bytes of each component, each at its own moment."""
        held: dict[str, int] = defaultdict(int)
        most: dict[str, int] = defaultdict(int)
        for name, size in self.timeline():
            held[name] += size
            most[name] = max(most[name], held[name])
        return dict(most)

    def _key(self, component: str) -> int:
        self._components.append(component)
        return len(self._components) - 1

    def _register(self, tensor: Tensor, component: str) -> tuple[int, int, int] | None:
        """Register a storage not seen before; return its (key, address, bytes), or None."""
        storage = tensor.untyped_storage()
        address, size = storage._cdata, -(-storage.nbytes() // self._block) * self._block
        if address in self._live or not size:
            return None
        self._live[address] = key = self._key(component)
        weakref.finalize(storage, self._release, address).atexit = False
        return key, address, size

    def _record(self, key: int, size: int) -> None:
        """Record that `size` bytes more, or less, are held under a key."""
        if size:
            self._held[key] += size
            self._events.append((key, size))

    def _release(self, address: int) -> None:
        key = self._live.pop(address)
        if self._replacement is not None and self._replacement[0] == key:
            # nothing was allocated in between: the new storage takes the place of the old one
            self._live[self._replacement[2]], self._replacement = key, None
            return
        self._settle()
        self._record(key, -self._held[key])

    def _settle(self) -> None:
        """Count a pending replacement as an allocation, since its old storage was not released in time."""
        if self._replacement is not None:
            _, key, _, size = self._replacement
            self._replacement = None
            self._record(key, size)


@dataclass
class Measured:
    """Result of a measurement: `peak` is the most bytes held beyond those at the start; 0 until the block has ended."""

    peak: int = 0


@contextlib.contextmanager
def measured_peak(device: torch.device | str) -> Iterator[Measured]:
    """Measure what torch's allocator for `device` hands out inside the block.

    On CUDA this is the growth of max_memory_allocated, whose statistics are reset. On the CPU it is the peak of all
    allocations and releases that torch's profiler records: tensors, and what operations and kernels allocate as
    tensors. Memory taken outside of torch's allocator (scratch of C++ kernels and of oneDNN) or by other threads is
    not seen. An exception passes through.
    """
    device, result = torch.device(device), Measured()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield result
        torch.cuda.synchronize(device)
        result.peak = torch.cuda.max_memory_allocated(device) - start
        return
    with profile(use_kineto=True, profile_memory=True) as recorded:
        yield result
    # the sort is stable: events of the same nanosecond stay in the order in which they were recorded
    events = (e for e in recorded.kineto_results.events() if e.name() == "[memory]")
    total = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        result.peak = max(result.peak, total)
