"""Describe what a figure was measured on in plain strings, so that two measurements can be compared.

Figures from different devices or software do not compare: a difference of the environment is no regression.
"""

import functools
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch

from moe_unlearn import native

# facts worth keeping whose difference does not forbid a comparison of speed
INFORMATIVE = frozenset({"system", "gpu_count"})
ABSENT = "none"
# bits of NVML's nvmlClocksEventReasons that mean the device is slower than it can be, whatever the work
_THROTTLED = {0x8: "hardware slowdown", 0x20: "software thermal", 0x40: "hardware thermal", 0x80: "power brake"}


def fingerprint(device: torch.device | str = "cpu") -> dict[str, str]:
    """Return the environment of a measurement on `device`; fields that do not apply are "none".

    It holds nothing that names the machine or its user, so it may be published.
    """
    device = torch.device(device)
    return {
        "device": device.type,
        "cpu": cpu(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "native": ABSENT if native.load("cpu") else _native(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        **_gpu(device),
    }


def _native() -> str:
    """Return the instruction set of our kernels and, where bfloat16 is multiplied as float32, that it is."""
    return native.instruction_set() + (", widened" if native.narrow_products() == "widened" else "")


def mismatch(base: Mapping[str, str], head: Mapping[str, str], *, informative: bool = False) -> list[str]:
    """Return "field: base -> head" for each field that differs and so blocks a comparison of speed.

    A field that only one of them has counts as different. With `informative`, fields that do not block are listed too.
    """
    fields = dict.fromkeys([*base, *head])
    return [
        f"{field}: {base.get(field, 'not recorded')} -> {head.get(field, 'not recorded')}"
        for field in fields
        if base.get(field) != head.get(field) and (informative or field not in INFORMATIVE)
    ]


def throttled(device: torch.device | str) -> str:
    """Return why the GPU runs slower than it can right now; "" if it does not, is no GPU or does not tell."""
    device = torch.device(device)
    if device.type != "cuda":
        return ""
    answer = _nvidia_smi(device, "clocks_event_reasons.active")
    if not answer.startswith("0x"):
        return ""
    bits = int(answer, 16)
    return ", ".join(reason for bit, reason in _THROTTLED.items() if bits & bit)


@functools.cache
def cpu() -> str:
    """Return the model name of the processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = (line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _gpu(device: torch.device) -> dict[str, str]:
    if device.type != "cuda":
        return dict.fromkeys(("gpu", "gpu_count", "gpu_memory", "power_limit", "driver", "cuda"), ABSENT)
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "gpu_count": str(torch.cuda.device_count()),
        "gpu_memory": f"{properties.total_memory >> 20} MiB",
        "power_limit": _nvidia_smi(device, "enforced.power.limit"),
        "driver": _nvidia_smi(device, "driver_version"),
        "cuda": torch.version.cuda or ABSENT,
    }


def _nvidia_smi(device: torch.device, field: str) -> str:
    """Return one field of nvidia-smi, or "unknown" where it is not there."""
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ABSENT
