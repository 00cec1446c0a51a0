"""Checks and changes what a Trainer's arguments and accelerate's configuration ask for."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def each_batch_synced(accelerator: Any, *, wanted: bool) -> Iterator[None]:
    """Have FSDP2 add up the gradients of each micro-batch inside, if `wanted`, and as it was set afterwards.

    The step reads each micro-batch's gradient, which accelerate would have at the last one only. What accelerate is
    told holds for all Trainers of the process.
    """
    told = accelerator.gradient_state.plugin_kwargs
    before = dict(told)
    if wanted:
        told["sync_each_batch"] = True
    try:
        yield
    finally:
        told.clear()
        told.update(before)


def asked_of_accelerate(engine: str) -> bool:
    """Return whether accelerate's configuration asks for an engine, "FSDP" or "DEEPSPEED"."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() == "true"


def check_deepspeed(asked: object) -> None:
    """Raise ValueError if DeepSpeed is `asked` for."""
    if asked:
        raise ValueError("DeepSpeed shares weights out in a way that is not supported; use FSDP2 (`fsdp=True`)")


def check_accelerate(accelerator: Any, fsdp: object, *, ranks: bool, sharded: bool) -> None:
    """Raise ValueError for what accelerate makes of FSDP that is not supported, and warn where it shares nothing out.

    `fsdp` is what the arguments ask for, `ranks` says whether there are several, `sharded` that weights are shared out.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None and (fsdp or asked_of_accelerate("FSDP")) and ranks and not sharded:
        kind = accelerator.distributed_type.value
        warnings.warn(
            f"FSDP was asked for, but accelerate ignores that where it sees {kind}, and trains as "
            "DistributedDataParallel does: every rank holds all weights. To share weights out on CPUs, call "
            "torch's fully_shard on the model, or load it with transformers' DistributedConfig(fsdp_size=...)",
            stacklevel=4,
        )
    if plugin is not None and plugin.fsdp_version != 2:
        raise ValueError("FSDP1 flattens weights, which is not supported; expected version 2 in `fsdp_config`")
    if plugin is not None and plugin.activation_checkpointing:
        raise ValueError(
            "`activation_checkpointing` in `fsdp_config` renames parameters, which is not supported; use "
            "`gradient_checkpointing` in TrainingArguments"
        )
