"""The only home of tile sizes: pure functions of shape, dtype and architecture.

`architecture` is the compute capability as one number: 80 (A100), 90 (H100, H200), 100 (B200). On the CPU, where
kernels run in the interpreter, it is 90 unless MOE_UNLEARN_TRITON_ARCH says otherwise; the same variable lets a
machine without a GPU compile for another one.
"""

import os

import torch

ARCHITECTURES = (80, 90, 100)
_INTERPRETED_PROGRAMS = 3


def architecture(device: torch.device) -> int:
    """The compute capability that kernels on `device` are compiled for."""
    assumed = os.environ.get("MOE_UNLEARN_TRITON_ARCH")
    if assumed:
        return int(assumed)
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def num_programs(device: torch.device) -> int:
    """How many programs a persistent kernel starts: one per multiprocessor, or a few in the interpreter."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count
