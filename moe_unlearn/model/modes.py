"""Switches a model for a while, to evaluation or training mode or to checkpoints that keep the graph.

No other module switches these. Afterwards everything is as the model's owner had set it, after an exception too.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

_CHECKPOINT = "_gradient_checkpointing_func"  # transformers' attribute on every module that may checkpoint


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch the model to evaluation mode inside, and restore each submodule's own training flag afterwards.

    `model.train(flag)` would overwrite all flags with one value: a frozen part that a caller keeps in evaluation mode
    would train with dropout from then on.
    """
    with _modes_kept(model):
        model.eval()
        yield


@contextlib.contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Switch the model to training mode inside, where transformers' checkpoints work, and restore as above."""
    with _modes_kept(model):
        model.train()
        yield


@contextlib.contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def put_in_mode(model: nn.Module, training: bool, *, but: Collection[nn.Module]) -> None:
    """Switch the modules of a model to one mode, but for some: those that it had before others were put into it."""
    for module in model.modules():
        if module not in but:
            module.training = training


def copy_modes(source: nn.Module, target: nn.Module) -> None:
    """Give each submodule of `target` the training flag of the one of `source` under the same name."""
    flags = {name: module.training for name, module in source.named_modules()}
    for name, module in target.named_modules():
        module.training = flags[name]


@contextlib.contextmanager
def checkpoints_with_graph(model: nn.Module) -> Iterator[None]:
    """Switch the gradient checkpoints of the forward passes inside to `use_reentrant=False`.

    A reentrant checkpoint runs its part of the model without a graph and builds the graph in the backward pass: a loss
    of a tensor that a hook caught inside has no gradient, and neither have weights whose inputs need none. The other
    kind computes the same numbers in the same memory. Checkpoints that are not transformers' stay as they are.
    """
    present = [(module, vars(module)[_CHECKPOINT]) for module in model.modules() if _CHECKPOINT in vars(module)]
    replaced = [(module, own) for module, own in present if _reentrant(own)]
    for module, own in replaced:
        # a partial of a partial keeps the arguments of the inner one
        setattr(module, _CHECKPOINT, partial(own, use_reentrant=False))
    try:
        yield
    finally:
        for module, own in replaced:
            setattr(module, _CHECKPOINT, own)


def _reentrant(function: Callable | None) -> bool:
    if isinstance(function, partial):
        return bool(function.keywords.get("use_reentrant", function.func is checkpoint))
    return function is checkpoint
