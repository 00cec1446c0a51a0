"""The verb `env`: what this machine and this installation have."""

import argparse
import platform
from importlib import metadata

import torch

from moe_unlearn import backend, native


def run(options: argparse.Namespace) -> None:
    """Print versions, devices, and which implementation each op would use here."""
    print(f"python {platform.python_version()} on {platform.machine()}")
    for package in ("moe-unlearn", "torch", "transformers", "triton", "peft", "datasets"):
        try:
            print(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"{package} not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"device {device}: {name}")
    for line in native.report():
        print(f"native library {line}")
    print()
    print(f"{'op':<28} {'auto':<8} available")
    for op in backend.registered():
        print(f"{op:<28} {backend.choose(op, 'auto', device):<8} {', '.join(backend.available(op, device))}")
    for (impl, why), names in backend.unusable(device).items():
        print(f"{impl} is not usable for {', '.join(names)}: {why}")
