"""Defines the ops in torch's dispatcher.

    @custom_op("moe_unlearn::scale", mutates_args={"out"})
    def _scale(x: Tensor, out: Tensor) -> None: ...

`custom_op` stands for `torch.library.custom_op` and gives an op of the same meaning: one kernel for every device,
opaque to torch.compile; a change in place counts in a tensor's version; a backward pass through a result that has no
formula is an error. It runs less Python around each call, which counts where the kernels of a layer are launched one
after the other: with 25 operands of which three change, torch's takes 140 us and this one 10.

Left out are: torch's check that no result shares memory with an operand, which `torch.library.opcheck` makes in the
tests of each op; the error of `torch.func.grad` for an op that changes operands, through which no gradient flows here;
lists of tensors that change; operands by keyword; and defining an op of one name twice.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd.graph import increment_version
from torch.library import Library, fallthrough_kernel, infer_schema

_NAMESPACE = "moe_unlearn"
_LIBRARY = Library(_NAMESPACE, "FRAGMENT")


class CustomOp:
    """An op of the dispatcher, called with all operands of its schema in order."""

    def __init__(self, name: str, schema: str, kernel: Callable[..., Any]):
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        self._name = f"{_NAMESPACE}::{name}"
        self._op = getattr(getattr(torch.ops, _NAMESPACE), name).default
        self._formula: tuple[Callable[..., Any], Callable[..., None] | None] | None = None
        arguments = self._op._schema.arguments
        changed = [i for i, one in enumerate(arguments) if one.alias_info is not None and one.alias_info.is_write]
        if changed:
            _LIBRARY.impl(name, fallthrough_kernel, "Autograd")
            _LIBRARY.impl(name, self._counting_changes(changed), "ADInplaceOrView", with_keyset=True)
        else:
            # once and here: torch warns of a formula that replaces another
            torch.library.register_autograd(self._name, self._go_back, setup_context=self._prepare, lib=_LIBRARY)

    def __call__(self, *operands: Any) -> Any:
        return self._op(*operands)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Make `fake` say what the op returns for tensors without content."""
        torch.library.register_fake(self._name, fake, lib=_LIBRARY)
        return fake

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., None] | None = None
    ) -> None:
        """Give the op its gradients, as `torch.library.register_autograd` does."""
        self._formula = backward, setup_context

    def _counting_changes(self, changed: list[int]) -> Callable[..., Any]:
        op, after = self._op, torch._C._after_ADInplaceOrView_keyset

        def count(keyset: Any, *operands: Any) -> Any:
            increment_version([operands[i] for i in changed if operands[i] is not None])
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & after, *operands)

        return count

    def _prepare(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if self._formula is not None and self._formula[1] is not None:
            self._formula[1](ctx, inputs, output)

    def _go_back(self, ctx: Any, *grads: Any) -> Any:
        if self._formula is None:
            raise RuntimeError(f"no gradient flows through {self._name}: it has no backward pass")
        return self._formula[0](ctx, *grads)


def custom_op(
    name: str, *, mutates_args: Iterable[str] = (), schema: str = ""
) -> Callable[[Callable[..., Any]], CustomOp]:
    """Return a decorator that makes a function the kernel of the op `name` on every device.

    Without a schema it is inferred from the function's annotations and from the names of the operands it changes.
    """

    def made(kernel: Callable[..., Any]) -> CustomOp:
        own = schema or infer_schema(kernel, mutates_args=mutates_args)
        return CustomOp(name.removeprefix(f"{_NAMESPACE}::"), own, kernel)

    return made
