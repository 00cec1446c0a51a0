"""Digests of tensors, by which files and ranks are compared without their bytes."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from moe_unlearn.expert_state import whole

_CHUNK = 2**24  # bytes copied at a time from a device, or from strided memory


def tensor_digest(tensor: Tensor, prefix: bytes = b"") -> str:
    """Return the SHA-256 of `prefix` and a tensor's dtype, shape and bytes, whatever its device and strides.

    Of one that is quantised it is that of the rounded tensor.
    """
    digest = hashlib.sha256(prefix)
    digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
    for chunk in _chunks(whole(tensor.detach())):
        digest.update(chunk.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor's elements in order, in parts, without a copy of the whole."""
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(max(_CHUNK // tensor.element_size(), 1))
    elif tensor.numel() * tensor.element_size() <= _CHUNK:
        yield tensor.contiguous()
    else:
        for part in tensor:
            yield from _chunks(part)
