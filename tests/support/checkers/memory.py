"""Memory that shows what is done with it: guard pages, fillings, pages that exist only where they are touched."""

import contextlib
import ctypes
import itertools
import mmap
import os
from collections.abc import Iterator

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
_PROT_NONE, _PROT_READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_NORESERVE = 0x4000  # Linux; Python's mmap does not name it
_GAP = 0xFF  # NaN in every float format, -1 in every integer
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def extent(tensor: Tensor) -> tuple[int, int]:
    """First byte of the tensor and the byte behind its last element, whatever its strides."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size() if tensor.numel() else start


class Mapping:
    """The bytes [start, stop) of somewhere, copied between two unreadable pages."""

    def __init__(self, start: int, stop: int, edge: str, alignment: int):
        self.source, self.size = start, stop - start
        pages = -(-(self.size + alignment) // PAGE) * PAGE
        self.length = pages + 2 * PAGE
        self.base = _libc.mmap(None, self.length, _PROT_READ_WRITE, _PRIVATE, -1, 0)
        assert self.base not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
        self.first, self.behind = self.base + PAGE, self.base + PAGE + pages
        if edge == "end":
            self.start = self.behind - self.size
            self.start -= (self.start - start) % alignment
        else:
            self.start = self.first + (start - self.first) % alignment
        ctypes.memset(self.first, _GAP, pages)
        ctypes.memmove(self.start, self.source, self.size)
        for page in (self.base, self.behind):
            assert _libc.mprotect(page, PAGE, _PROT_NONE) == 0, os.strerror(ctypes.get_errno())

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor stands in the copy."""
        return self.start <= tensor.data_ptr() < self.start + self.size

    def gaps_touched(self) -> bool:
        """Whether anything was written between the tensor and a guard page."""
        before = ctypes.string_at(self.first, self.start - self.first)
        after = ctypes.string_at(self.start + self.size, self.behind - self.start - self.size)
        return any(gap.strip(bytes([_GAP])) for gap in (before, after))

    def write_back(self) -> None:
        ctypes.memmove(self.source, self.start, self.size)

    def moved(self, tensor: Tensor) -> Tensor:
        """The same tensor in this mapping."""
        offset = tensor.data_ptr() - self.source
        width = tensor.element_size()
        count = (self.size - offset) // width
        buffer = (ctypes.c_byte * (count * width)).from_address(self.start + offset)
        flat = torch.frombuffer(buffer, dtype=tensor.dtype, count=count)
        return flat.as_strided(tensor.shape, tensor.stride())

    def close(self) -> None:
        _libc.munmap(self.base, self.length)


def guarded(tensor: Tensor, edge: str = "end", alignment: int = 1) -> Tensor:
    """A copy of `tensor`, strides and all, between unreadable pages; never freed."""
    if not tensor.numel():
        return tensor.clone()
    return Mapping(*extent(tensor), edge, alignment).moved(tensor.detach())


_EMPTY = [
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (Tensor, "new_empty"),
    (Tensor, "new_empty_strided"),
]
_SHAPED = [(torch, "empty"), (Tensor, "new_empty")]


@contextlib.contextmanager
def filled(byte: int) -> Iterator[None]:
    """Whatever Python code allocates with `torch.empty` and its kin holds `byte` in every byte."""

    def filling(make):
        def made(*arguments, **keywords):
            tensor = make(*arguments, **keywords)
            if tensor.device.type == "cpu" and "out" not in keywords and tensor.untyped_storage().nbytes():
                ctypes.memset(tensor.untyped_storage().data_ptr(), byte, tensor.untyped_storage().nbytes())
            return tensor

        return made

    originals = [getattr(owner, name) for owner, name in _EMPTY]
    try:
        for (owner, name), original in zip(_EMPTY, originals, strict=True):
            setattr(owner, name, filling(original))
        yield
    finally:
        for (owner, name), original in zip(_EMPTY, originals, strict=True):
            setattr(owner, name, original)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """In elements."""
    return tuple(itertools.accumulate(shape[:0:-1], lambda a, b: a * b, initial=1))[::-1]


def lazy(shape: tuple[int, ...], strides: tuple[int, ...] | None = None, dtype=torch.float32) -> Tensor:
    """Zeros in memory that exists only where it is touched; strides in elements, default contiguous."""
    strides = strides or contiguous_strides(shape)
    if 0 in shape:
        return torch.empty_strided(shape, strides, dtype=dtype)
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    buffer = mmap.mmap(-1, span * dtype.itemsize, flags=_PRIVATE | _NORESERVE)
    return torch.frombuffer(buffer, dtype=dtype).as_strided(shape, strides)


@contextlib.contextmanager
def lazily(allocate=None) -> Iterator[None]:
    """`torch.empty` and `new_empty` with a shape of several dimensions give `allocate(shape, dtype=)`, else `lazy`."""
    allocate = allocate or lazy
    originals = {owner: getattr(owner, name) for owner, name in _SHAPED}

    def made(owner):
        def empty(*arguments, dtype=None, device=None):
            tensor = arguments[0] if owner is Tensor else None
            shape = arguments[tensor is not None :]
            shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
            dtype = dtype or (torch.get_default_dtype() if tensor is None else tensor.dtype)
            if len(shape) < 2:
                return torch.zeros(shape, dtype=dtype)
            return allocate(shape, dtype=dtype)

        return empty

    try:
        for owner, name in _SHAPED:
            setattr(owner, name, made(owner))
        yield
    finally:
        for owner, name in _SHAPED:
            setattr(owner, name, originals[owner])


def resident_bytes() -> int:
    """Memory of this process that is really there."""
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * PAGE
