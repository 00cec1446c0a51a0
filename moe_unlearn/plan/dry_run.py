"""Rehearsal, which runs a step's own code on tensors without storage and counts what it would allocate and compute.

    with Rehearsal(device) as rehearsal:
        shadow = rehearsal.twin(step, {})        # its parameters and state are fakes; the step stays untouched
        shadow(forget_batch, retain_batch)
    rehearsal.ledger.peak()

Floating-point tensors are fakes (torch's FakeTensor): they have shape, strides, dtype and device, and each
operation returns fakes of its results, autograd included. Integer and boolean tensors stay real, because their
values decide shapes: token ids, attention masks, packed weight masks, expert lists. Where a value of a fake is
needed, it is the one that leads to the most work:

    a scalar             1: finite, positive, true
    a mask               all set, so that every row, expert and slice takes part
    inner products       the unit matrix, so that MOLLM keeps every objective

An in-place write of fake values into a real tensor is left out. Kernels do not run, so memory that they allocate
inside is not seen here; `costs.workspace` gives it.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from moe_unlearn.plan import costs, results
from moe_unlearn.plan.memory import Ledger

aten = torch.ops.aten

_SMALL = 1024  # elements up to which a new floating-point tensor is real: counters, scalars, rotary frequencies
_LARGE = 1 << 26  # elements from which a new tensor of any dtype is a fake
_Watch = Callable[[OpOverload, tuple, dict], None]
_watching: _Watch | None = None
_INNER_PRODUCTS = ("moe_unlearn::gram", "moe_unlearn::gram_factors", "moe_unlearn::expert_wgrad_inner")


class Rehearsal(TorchDispatchMode):
    """The mode described in the module docstring; `phase` is the component to which new allocations are counted.

    flops, moved: per kernel, floating-point operations and bytes read and written, each operand once. losses: how often
    `token_loss` ran. products: how many matrix products of hidden states and head it took, its backward pass included.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = torch.device(device)
        self.ledger = Ledger(device)
        self.phase = "activations"
        self.flops: dict[str, int] = defaultdict(int)
        self.moved: dict[str, int] = defaultdict(int)
        self.losses, self.products = 0, 0.0
        self._fake_mode = FakeTensorMode()
        self._watch = _watching

    def reset_costs(self) -> None:
        """Set the counts of floating-point operations and bytes to zero."""
        self.flops.clear()
        self.moved.clear()
        self.losses, self.products = 0, 0.0

    def twin(self, value: Any, memo: dict[int, Any]) -> Any:
        """Return a deep copy of `value` whose floating-point tensors are fakes; `memo` is as in copy.deepcopy."""
        with _Copying(self):
            return copy.deepcopy(value, memo)

    def fake(self, tensor: Tensor) -> Tensor:
        """Return a fake on the rehearsal's device with the shape, strides and dtype of `tensor`."""
        with self._fake_mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a fake of this shape on the rehearsal's device, which is not counted."""
        with _disable_current_modes(), self._fake_mode:
            return torch.empty(shape, dtype=dtype, device=self.device)

    def __torch_dispatch__(
        self, function: OpOverload, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is torch.ops.prim.device.default:  # more than half of all calls, and none is an operation
            return args[0].fake_device
        kwargs = kwargs or {}
        if self._watch is not None and function.namespace == "moe_unlearn":
            self._watch(function, args, kwargs)
        if torch.is_inference_mode_enabled():  # where torch leaves it to a mode to take composite operations apart
            with self:
                parts = function.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(isinstance(t, FakeTensor) for t in tensors):
            out = self._on_fakes(function, args, kwargs)
        elif tensors:
            out = function(*args, **kwargs)
        else:
            out = self._constructed(function, args, kwargs)
        self._count(function, args, kwargs, tensors, out)
        return out

    def _constructed(self, function: OpOverload, args: tuple, kwargs: dict) -> Any:
        with self._fake_mode:
            fake = function(*args, **kwargs)
        if not isinstance(fake, FakeTensor):
            return fake
        limit = _SMALL if fake.is_floating_point() else _LARGE
        return function(*args, **kwargs) if fake.numel() <= limit else fake

    def _on_fakes(self, function: OpOverload, args: tuple, kwargs: dict) -> Any:
        name = function._schema.name
        if function is aten._local_scalar_dense.default:
            return torch.ones((), dtype=args[0].dtype).item()
        if function is aten.equal.default:
            return True
        if function is aten.nonzero.default:
            return self._indices(args[0])
        if function is aten.masked_select.default:
            return self._run(aten.index.Tensor, (args[0], self._expanded([args[1]])), {})
        if (
            name == "aten::_grouped_mm" and args[0].dim() == 2 and args[1].dim() == 3
        ):  # torch's fakes know bfloat16 alone
            return self.empty((args[0].shape[0], args[1].shape[-1]), args[0].dtype)
        if name in _INNER_PRODUCTS:
            like = self._run(function, args, kwargs)
            return torch.eye(like.shape[-1], dtype=like.dtype, device=self.device).expand(like.shape)
        if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
            args = (args[0], self._expanded(args[1]), *args[2:])
        if _in_place(function) and not isinstance(args[0], FakeTensor):
            return args[0]
        return self._run(function, args, kwargs)

    def _run(self, function: OpOverload, args: tuple, kwargs: dict) -> Any:
        def faked(value: object) -> object:
            return self.fake(value) if isinstance(value, Tensor) and not isinstance(value, FakeTensor) else value

        call = results.call(function, args, kwargs)
        if call is not None and (known := results.made(call, self._fake_mode)) is not None:
            return known
        if any(isinstance(t, Tensor) and not isinstance(t, FakeTensor) for t in tree_leaves((args, kwargs))):
            args, kwargs = tree_map(faked, (args, kwargs))
        with self._fake_mode:
            out = function(*args, **kwargs)
        if call is not None:
            results.remember(call, tree_leaves((args, kwargs)), out)
        return out

    def _indices(self, mask: Tensor) -> Tensor:
        """Return the indices [n, dims] of a mask's set elements; of a fake mask, indices of all elements."""
        if isinstance(mask, FakeTensor):
            return self.empty((mask.numel(), mask.dim()), torch.int64)
        return mask.nonzero()

    def _expanded(self, indices: Iterable[Tensor | None]) -> list[Tensor | None]:
        """Replace masks among `indices` by index tensors, as torch's indexing does internally."""
        out: list[Tensor | None] = []
        for index in indices:
            if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                found = self._indices(index)
                self.ledger.add(found, "workspace")
                out += found.unbind(1)
            else:
                out.append(index)
        return out

    def _count(self, function: OpOverload, args: tuple, kwargs: dict, tensors: list[Tensor], out: object) -> None:
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if function.is_view:
            return
        kernel = costs.kernel(function)
        self.flops[kernel] += costs.flops(function, args, kwargs, out)
        self.losses += kernel == "token_loss"
        self.products += costs.products(function, args, kwargs)
        self.moved[kernel] += sum(costs.nbytes(t) for t in (*tensors, *results))
        for tensor in results:
            if function is aten.add.Tensor and _summing(*args):
                self.ledger.replace(args[0], tensor, self.phase)
            else:
                self.ledger.add(tensor, self.phase)
        self.ledger.pulse(costs.workspace(function, args, kwargs), "workspace")


@contextmanager
def watched(watch: _Watch) -> Iterator[None]:
    """Show `watch` each call of an op of ours in the rehearsals that are made inside: its overload and its operands."""
    global _watching
    before, _watching = _watching, watch
    try:
        yield
    finally:
        _watching = before


@contextmanager
def listed(number: int) -> Iterator[None]:
    """Let `tolist` of a fake give 1.0, True or `number` at once inside; torch asks for one element after the other."""
    before = FakeTensor.tolist

    def ones(fake: Tensor) -> Any:
        value: Any = 1.0 if fake.is_floating_point() else True if fake.dtype == torch.bool else number
        for size in reversed(fake.shape):
            value = [value] * size
        return value

    FakeTensor.tolist = ones  # type: ignore[assignment, method-assign]  # no mode sees the call
    try:
        yield
    finally:
        FakeTensor.tolist = before  # type: ignore[method-assign]


def _in_place(function: OpOverload) -> bool:
    """Return whether a torch operation writes its first argument and returns it."""
    first = next(iter(function._schema.arguments), None)
    writes = first is not None and first.alias_info is not None and first.alias_info.is_write
    return writes and function.namespace == "aten"


def _summing(old: Tensor, new: Tensor) -> bool:
    """Return whether this addition is autograd's sum of gradients.

    On real tensors autograd adds in place if nothing else refers to the first one; on fakes it adds out of place.
    """
    inside = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
    return inside and isinstance(new, Tensor) and old.shape == new.shape and old.dtype == new.dtype


class _Copying(TorchFunctionMode):
    """A mode inside which copy.deepcopy turns floating-point tensors into fakes."""

    def __init__(self, rehearsal: Rehearsal):
        super().__init__()
        self._rehearsal = rehearsal

    def __torch_function__(
        self, function: Callable, types: tuple[type, ...], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is torch.Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                real = not (tensor.is_meta or tensor.is_floating_point() and tensor.numel() > _SMALL)
                memo[id(tensor)] = tensor.clone() if real else self._rehearsal.fake(tensor)
            return memo[id(tensor)]
        if function is torch._C.TensorBase.clone:  # how a parameter copies its data
            return self._rehearsal.fake(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))
