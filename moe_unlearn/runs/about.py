"""How a run was made, and what it cost: `about.json` and `cost.json` of its folder."""

import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("moe-unlearn", "torch", "transformers", "triton", "peft", "datasets")


def versions() -> dict[str, str]:
    """Return the versions of Python and of what is installed of `PACKAGES`."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def about(command: str, seed: int, device: torch.device) -> dict[str, Any]:
    """Return what `about.json` has: command, when it was started, seed, machine and versions."""
    machine = f"{processor()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}; {machine}"
    return {
        "command": command,
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "seed": seed,
        "machine": machine,
        "versions": versions(),
    }


def processor() -> str:
    """Return the name of the processor, or the kind where Linux has no name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


@dataclass
class Cost:
    """Seconds by phase and the peak of memory; `to_dict` has the form of `cost.json`.

    The peak of a GPU is that of torch's tensors since this was made, of this process; without a GPU it is the resident
    memory of the whole process since it began, with its libraries.
    """

    device: torch.device
    planned: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of what is done inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def to_dict(self) -> dict[str, Any]:
        """Return seconds, and bytes planned and measured so far."""
        if self.device.type == "cuda":
            measured, how = torch.cuda.max_memory_allocated(self.device), "peak of torch's tensors on the GPU"
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            measured = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            how = "peak of the whole process, libraries and evaluation included"
        return {"seconds": self.seconds, "planned": self.planned, "measured": measured, "how": how}
