"""Raises an exception at any call of an op or of a hook in a step, and compares what is left of the step."""

import copy
import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from moe_unlearn import backend, experts

PACKAGE = Path(experts.__file__).parent


class Injector:
    """Counts the calls of ops and of hooks, and raises at one of them."""

    def __init__(self, monkeypatch):
        self.calls, self.at, self.error, self.places = [], None, None, set()
        resolve = backend.resolve
        monkeypatch.setattr(backend, "resolve", lambda name, *given: self.watched(name, resolve(name, *given)))
        for owner, name in (
            (nn.Module, "register_forward_hook"),
            (nn.Module, "register_forward_pre_hook"),
            (torch.optim.Optimizer, "register_step_pre_hook"),
        ):
            self._watch(monkeypatch, owner, name)

    def _watch(self, monkeypatch, owner, name):
        register = getattr(owner, name)

        def registered(module, hook, **keywords):
            place = Path(sys._getframe(1).f_code.co_filename)
            if not place.is_relative_to(PACKAGE):
                return register(module, hook, **keywords)
            self.places.add(str(place.relative_to(PACKAGE)))
            return register(module, self.watched("hook", hook), **keywords)

        monkeypatch.setattr(owner, name, registered)

    def watched(self, name, act):
        def acts(*given, **keywords):
            self.calls.append(name)
            hit = len(self.calls) - 1 == self.at
            if hit and self.error is not torch.OutOfMemoryError:
                raise self.error
            try:
                return act(*given, **keywords)
            finally:
                if hit:  # memory may be gone when the op has done its work
                    raise self.error

        return acts

    def begin(self, at=None, error=None):
        self.calls, self.at, self.error = [], at, error


def state_of(step):
    """All that a step must leave as it was, but for the weights, which are in the model's state."""
    modules = [*step.model.modules()]
    return {
        "weights": {name: own(t).clone() for name, t in step.model.state_dict().items()},
        "gradients": [p.grad for p in step.model.parameters()] + [*step.gradients.held()],
        "optimizer": copy.deepcopy(own(step.optimizer.state_dict())),
        "inputs": [experts._state(m).inputs for m in experts.experts_modules(step.model).values()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in modules],
        "flags": [(p.requires_grad, p._backward_hooks) for p in step.model.parameters()]
        + [m.training for m in modules],
        "counters": (step.steps, step.done, step.objectives.dual.value, len(step.tally.parts), step.tally.closed),
    }


def own(value):
    """The part of this rank of what ranks share out, in a value of any structure."""
    if isinstance(value, dict):
        return {key: own(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [own(each) for each in value]
    return value.to_local() if isinstance(value, DTensor) else value


def same(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def differing(one, other):
    return {key for key in one if not same(one[key], other[key])}
