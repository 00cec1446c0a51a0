"""Writes safetensors files one tensor at a time, so that no more than one need be in memory.

The file has the bytes that `safetensors.torch.save_file` writes of the same tensors: 8 bytes with the length of the
header, the header in JSON, and the tensors, sorted by their dtype and then by name.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe_unlearn.files import whole_file

# in the order in which safetensors sorts them, from the last to the first
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Kind(NamedTuple):
    """The dtype and the shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"

    @property
    def size(self) -> int:
        """Return the bytes of such a tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def kind_of(tensor: Tensor) -> Kind:
    """Return the kind of a tensor; of one that is shared out over ranks, that of the whole."""
    return Kind(tensor.dtype, tuple(tensor.shape))


def dtype_name(dtype: torch.dtype, tensor: str) -> str:
    """Return how safetensors call a dtype; raise TypeError, naming the tensor, for one that they do not have."""
    if dtype not in NAMES:
        raise TypeError(f"{tensor}: safetensors files hold no {dtype}")
    return NAMES[dtype]


@contextmanager
def tensor_file(
    path: Path, kinds: Mapping[str, Kind], about: Mapping[str, str] | None = None
) -> Iterator[Callable[[str, Tensor], None]]:
    """Yield `write(name, tensor)`, which writes each tensor of `kinds` to the safetensors file `path`, in any order.

    The file appears when the block ends, as `whole_file` does; `about` is its metadata. Raises TypeError for a dtype
    that safetensors does not have, and ValueError for a tensor of another kind, and if one was not written.
    """
    order = {dtype: i for i, dtype in enumerate(NAMES)}
    names = sorted(kinds, key=lambda name: (-order.get(kinds[name].dtype, 0), name))
    header: dict[str, object] = {} if about is None else {"__metadata__": dict(about)}
    places, end = {}, 0
    for name in names:
        kind, places[name] = kinds[name], end
        end += kind.size
        header[name] = {
            "dtype": dtype_name(kind.dtype, name),
            "shape": list(kind.shape),
            "data_offsets": [places[name], end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with whole_file(path) as unfinished, unfinished.open("r+b") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(start + end)

        def write(name: str, tensor: Tensor) -> None:
            if kind_of(tensor) != kinds[name]:
                raise ValueError(f"{path.name}: expected {name} to be {kinds[name]}; got {kind_of(tensor)}")
            file.seek(start + places.pop(name))
            file.write(bytes_of(tensor).data)

        yield write
        if places:
            raise ValueError(f"{path.name}: {', '.join(places)} not written")


def bytes_of(tensor: Tensor) -> np.ndarray:
    """Return the bytes of a tensor, in the order of its elements; those of one on the CPU are shared if they can be."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    octets: np.ndarray = flat.view(torch.uint8).numpy()
    return octets
