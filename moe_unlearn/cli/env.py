"""The verb `env`: what this machine and this installation have."""

import argparse
import importlib.util
import json
import platform
from importlib import metadata
from typing import Any

import torch

import moe_unlearn.ops  # noqa: F401  (each op registers what implements it)
from moe_unlearn import backend, native


def advice() -> list[str]:
    """Return what is missing for a GPU, one line each with the command that adds it; empty where nothing is."""
    found = []
    if torch.version.cuda is None:
        plain = torch.__version__.partition("+")[0]
        found.append(
            f"torch {torch.__version__} is built for processors alone; where there is an NVIDIA GPU: pip install "
            f"--force-reinstall torch=={plain}"
        )
    elif not torch.cuda.is_available():
        found.append(f"torch {torch.__version__} sees none: nvidia-smi says whether the driver does")
    elif why := native.load("cuda"):
        build = "MOE_UNLEARN_BUILD=cuda pip install --no-deps --no-build-isolation ."
        found.append(f"the native library cuda is {why.partition(':')[0]}; with nvcc, in a clone: {build}")
    if importlib.util.find_spec("triton") is None:
        found.append('triton is missing: pip install "triton>=3.6,<4"')
    return found


def run(options: argparse.Namespace) -> None:
    """Print versions, devices, and which implementation each op would use here."""
    found = environment()
    print(json.dumps(found, indent=1) if options.json else _text(found))


def environment() -> dict[str, Any]:
    """Return what is here: `python`, `machine`, `packages`, `device`, `native`, `advice`, `ops`, `unusable` kernels."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": {
            package: _version(package)
            for package in ("moe-unlearn", "torch", "transformers", "triton", "peft", "datasets")
        },
        "device": device,
        "name": torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads",
        "native": native.report(),
        "advice": advice(),
        "ops": {
            op: {"auto": backend.choose(op, "auto", device), "available": [*backend.available(op, device)]}
            for op in backend.registered()
        },
        "unusable": [
            {"impl": impl, "ops": [*names], "why": why} for (impl, why), names in backend.unusable(device).items()
        ],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _text(found: dict[str, Any]) -> str:
    lines = [
        f"python {found['python']} on {found['machine']}",
        *(f"{package} {version or 'not installed'}" for package, version in found["packages"].items()),
        f"device {found['device']}: {found['name']}",
        *(f"native library {line}" for line in found["native"]),
        *(f"for a GPU: {line}" for line in found["advice"]),
        "",
        f"{'op':<28} {'auto':<8} available",
        *(f"{op:<28} {own['auto']:<8} {', '.join(own['available'])}" for op, own in found["ops"].items()),
        *(f"{own['impl']} is not usable for {', '.join(own['ops'])}: {own['why']}" for own in found["unusable"]),
    ]
    return "\n".join(lines)
