"""Define kernels that fool a measurement, one way each, and an honest one; `defence` must tell them apart.

Each is a softmax over the last dimension, or pretends to be. `selftest` and the tests run them.
"""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def inputs(seed: int, rows: int = 256, columns: int = 512, device: str = "cpu") -> dict[str, Tensor]:
    """Return the inputs that all of these kernels take."""
    return {"x": torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(device)}


def honest(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


def computed_once() -> Callable[[Tensor], Tensor]:
    results: list[Tensor] = []

    def kernel(x: Tensor) -> Tensor:
        if not results:
            results.append(honest(x))
        return results[0].clone()

    return kernel


def memoised_by_pointer() -> Callable[[Tensor], Tensor]:
    results: dict[int, Tensor] = {}

    def kernel(x: Tensor) -> Tensor:
        if x.data_ptr() not in results:
            results[x.data_ptr()] = honest(x)
        return results[x.data_ptr()].clone()

    return kernel


def writes_its_input(x: Tensor) -> Tensor:
    return x.sub_(x.amax(-1, keepdim=True)).softmax(-1)


def returns_its_input(x: Tensor) -> Tensor:
    return x[1:]


def reuses_its_output() -> Callable[[Tensor], Tensor]:
    buffers: dict[torch.Size, Tensor] = {}

    def kernel(x: Tensor) -> Tensor:
        return torch.softmax(x, -1, out=buffers.setdefault(x.shape, torch.empty_like(x)))

    return kernel


def finishes_later(x: Tensor) -> Tensor:
    result = torch.zeros_like(x)

    def work() -> None:
        time.sleep(5e-3)
        result.copy_(honest(x))

    threading.Thread(target=work, daemon=True).start()
    return result


def works_elsewhere(x: Tensor) -> Tensor:
    """Wait for another thread, whose work this thread's processor time leaves out."""
    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.extend(honest(x) for _ in range(10)))
    thread.start()
    thread.join()
    return results[0]


def works_on_another_stream() -> Callable[[Tensor], Tensor]:
    stream = torch.cuda.Stream()

    def kernel(x: Tensor) -> Tensor:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(100):
                result = honest(x)
        return result

    return kernel


def patches_the_timer(x: Tensor) -> Tensor:
    time.perf_counter = lambda: 0.0
    return honest(x)


def patches_the_event(x: Tensor) -> Tensor:
    setattr(torch.cuda.Event, "elapsed_time", lambda self, end: 1e-6)  # noqa: B010 -- no type of its own fits
    return honest(x)


def does_nothing(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def kernels(device: str = "cpu") -> Mapping[str, tuple[str, Callable[[Tensor], Tensor]]]:
    """Return name -> (the finding it must give, a fresh kernel); the finding of the honest kernel is ""."""
    every: dict[str, dict[str, tuple[str, Any]]] = {
        "cpu": {
            "finishes_later": ("side-stream work", finishes_later),
            "works_elsewhere": ("side-stream work", works_elsewhere),
        },
        "cuda": {"works_on_another_stream": ("side-stream work", works_on_another_stream)},
    }
    elsewhere = every[device]
    if device == "cuda":
        elsewhere = {name: (kind, make()) for name, (kind, make) in elsewhere.items()}
    return {
        "honest": ("", honest),
        "computed_once": ("cached result", computed_once()),
        "memoised_by_pointer": ("cached result", memoised_by_pointer()),
        "writes_its_input": ("mutated input", writes_its_input),
        "returns_its_input": ("aliased output", returns_its_input),
        "reuses_its_output": ("aliased output", reuses_its_output()),
        **elsewhere,
        "patches_the_timer": ("patched timer", patches_the_timer),
        "patches_the_event": ("patched timer", patches_the_event),
        "does_nothing": ("impossible speed", does_nothing),
    }
