"""Evaluation mode for a while: the one place that switches a model and gives every submodule its own mode back."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` inside; each submodule's own training flag afterwards, after an exception too.

    `model.train(flag)` would overwrite them all with one: a frozen part that a caller keeps in evaluation mode would
    train with dropout from then on.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
