"""Routes of a step, recorded in one run and forced in another, so that runs in different precisions are comparable.

A token near a tie goes to other experts once a number is rounded differently, and then no criterion for rounding holds.
All ways of making a step see the rows in the same order, however they stack and pad them. A token is therefore
identified by its place among the attended tokens of all forward passes. Source: our specification.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moe_unlearn.experts import experts_modules
from moe_unlearn.model.head import decoder_of
from moe_unlearn.model.packing import call_in


class Routes:
    """The experts that attended tokens visit, by layer, in the order of the forward passes.

    `rerouted` counts the tokens, once for each layer, that would have gone to other experts than they were forced to.
    """

    def __init__(self, model: nn.Module):
        self.layers: dict[str, list[Tensor]] = {name: [] for name in experts_modules(model)}
        self.rerouted = 0

    @property
    def count(self) -> int:
        return sum(len(index) for parts in self.layers.values() for index in parts)

    def joined(self) -> dict[str, Tensor]:
        """Return the experts of all tokens, [tokens, K], by layer; layers that no token has met are left out."""
        return {name: torch.cat(parts) for name, parts in self.layers.items() if parts}

    def add(self, joined: Mapping[str, Tensor]) -> None:
        """Add the tokens of further forward passes by layer, as `joined` returns them."""
        for name, index in joined.items():
            self.layers[name].append(index)

    def equal(self, other: "Routes") -> bool:
        """Return whether every token went to the same experts in both."""
        pairs = zip(self.layers.values(), other.layers.values(), strict=True)
        return all(
            torch.equal(*(torch.cat(parts).sort(1).values for parts in pair)) if all(pair) else not any(pair)
            for pair in pairs
        )

    @contextlib.contextmanager
    def record(self, model: nn.Module, forced: "Routes | None" = None, *, wide: bool = False) -> Iterator[None]:
        """Record the forward passes inside; `forced` are routes to take, `wide` computes everything in float64."""
        mode = _Mode(self, forced, wide)

        def decoder(module: nn.Module, args: tuple, keywords: dict) -> None:
            # a gradient checkpoint's recomputation belongs to a backward pass and does not call the decoder
            call = call_in(module)
            mode.attended, mode.tokens, mode.layer = call.order(), call.shape.numel(), 0

        def leave(*_: object) -> None:
            mode.attended = None

        def experts(name: str, module: nn.Module, args: tuple, keywords: dict) -> None:
            if mode.attended is not None:
                index = keywords["top_k_index"] if "top_k_index" in keywords else args[1]
                self.layers[name].append(index.detach()[mode.attended])
                mode.layer += 1

        own = decoder_of(model)
        handles = [
            own.register_forward_pre_hook(decoder, with_kwargs=True),
            own.register_forward_hook(leave, always_call=True),
            *(
                module.register_forward_pre_hook(partial(experts, name), with_kwargs=True)
                for name, module in experts_modules(model).items()
            ),
        ]
        try:
            with mode if forced is not None else contextlib.nullcontext():
                yield
        finally:
            for handle in handles:
                handle.remove()


class _Mode(TorchFunctionMode):
    """A mode that, within a decoder, makes topk take the forced routes and turns explicit float32 into float64."""

    def __init__(self, routes: Routes, forced: Routes | None, wide: bool):
        self.routes, self.forced, self.wide = routes, forced, wide
        self.attended: Tensor | None = None  # their places in the call, in the order of the batch
        self.tokens = self.layer = 0

    def __torch_function__(
        self, function: Callable, types: tuple[type, ...], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.attended is None:
            return function(*args, **kwargs)
        if self.wide:
            # transformers computes norms, softmaxes and routers in float32 whatever the model's dtype
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {key: torch.float64 if v is torch.float32 else v for key, v in kwargs.items()}
            if function is torch.Tensor.float:
                function = torch.Tensor.double
        result = function(*args, **kwargs)
        if function in (torch.topk, torch.Tensor.topk):
            return self._forced(args[0] if args else kwargs["input"], result)
        return result

    def _forced(self, scores: Tensor, result: Any) -> Any:
        assert self.forced is not None and self.attended is not None
        names = list(self.routes.layers)
        if self.layer >= len(names):
            return result
        known = self.forced.layers[names[self.layer]]
        start = sum(len(index) for index in self.routes.layers[names[self.layer]])
        index = torch.cat(known)[start : start + len(self.attended)] if known else None
        if index is None or result.indices.shape != (self.tokens, index.shape[1]):
            return result
        own = result.indices.clone()
        self.routes.rerouted += int((own[self.attended].sort(1).values != index.sort(1).values).any(1).sum())
        own[self.attended] = index.to(own.dtype)
        return torch.return_types.topk((scores.gather(-1, own), own))
