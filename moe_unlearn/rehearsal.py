"""Rehearsal: a step's own code on tensors without storage, counting what it would allocate and compute.

    with Rehearsal(device) as rehearsal:
        shadow = rehearsal.twin(step)            # parameters and state are fakes, nothing of the step is touched
        shadow(forget_batch, retain_batch)
    rehearsal.ledger.peak()

Floating-point tensors are fakes (torch's FakeTensor): they have shape, strides, dtype and device, and each
operation yields fakes of what it would return, autograd included. Integer and boolean tensors stay real, for
their values decide shapes: token ids, attention masks, packed weight masks, expert lists. Where a fake would
have to tell a value, the answer is the one that asks for most:

    a scalar             1: finite, positive, true
    a mask               all of it; so every row, expert and slice takes part
    inner products       the unit matrix, so that MOLLM keeps every objective

An in-place write of fake values into a real tensor is left out. Kernels do not run, so what they allocate
inside is not seen here: `costs.workspace` says it.
"""

import copy
import weakref
from collections import defaultdict

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from moe_unlearn import costs

aten = torch.ops.aten

_SMALL = 1024  # elements up to which a new floating-point tensor is real: counters, scalars, rotary frequencies
_LARGE = 1 << 26  # elements from which a new tensor of any dtype is a fake
_INNER_PRODUCTS = ("moe_unlearn::gram", "moe_unlearn::gram_factors", "moe_unlearn::expert_wgrad_inner")
_CUDA_BLOCK = 512  # bytes to which torch's CUDA allocator rounds


class Ledger:
    """Allocations and releases in their order, each storage with a key and, once known, a component."""

    def __init__(self, device: torch.device):
        self._block = _CUDA_BLOCK if device.type == "cuda" else 1
        self._events: list[tuple[int, int]] = []
        self._live: dict[int, int] = {}  # address of the storage -> key
        self._component: dict[int, str] = {}
        self._keys = 0

    def add(self, tensor: Tensor, component: str) -> None:
        """Count the storage of `tensor` from now until it is released; nothing if it is counted already."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._live or not storage.nbytes():
            return
        self._keys += 1
        self._live[storage._cdata] = self._keys
        size = -(-storage.nbytes() // self._block) * self._block
        self._component[self._keys] = component
        self._events.append((self._keys, size))
        weakref.finalize(storage, self._release, storage._cdata, size).atexit = False

    def _release(self, address: int, size: int) -> None:
        self._events.append((self._live.pop(address), -size))

    def pulse(self, size: int, component: str = "workspace") -> None:
        """Count `size` bytes that come and go at once, as what a kernel allocates inside."""
        if size:
            self._keys += 1
            self._component[self._keys] = component
            self._events += [(self._keys, size), (self._keys, -size)]

    def label(self, tensors, component: str) -> None:
        """What has turned out to be `component`: a storage that is counted changes name, back to its start."""
        for tensor in tensors:
            key = self._live.get(tensor.untyped_storage()._cdata)
            if key is not None:
                self._component[key] = component

    def peak(self) -> dict[str, int]:
        """Bytes by component at the moment when their sum is largest."""
        total = most = at = 0
        for i, (_, size) in enumerate(self._events, 1):
            total += size
            if total > most:
                most, at = total, i
        held: dict[str, int] = defaultdict(int)
        for key, size in self._events[:at]:
            held[self._component[key]] += size
        return {name: size for name, size in held.items() if size}


class Rehearsal(TorchDispatchMode):
    """The mode of the module docstring; `phase` names the component of what is allocated next.

    flops, moved: per kernel, floating-point operations and bytes read and written, each operand once.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.ledger = Ledger(device)
        self.phase = "activations"
        self.flops: dict[str, int] = defaultdict(int)
        self.moved: dict[str, int] = defaultdict(int)
        self._fake_mode = FakeTensorMode()

    def twin(self, value, shared=()):
        """A deep copy of `value` without its storage; the objects in `shared` are in it themselves."""
        memo = {id(thing): thing for thing in shared}
        with _Copying(self):
            return copy.deepcopy(value, memo)

    def fake(self, tensor: Tensor) -> Tensor:
        """A fake on the rehearsal's device with the shape, strides and dtype of `tensor`."""
        with self._fake_mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(isinstance(t, FakeTensor) for t in tensors):
            out = self._on_fakes(function, args, kwargs)
        elif tensors:
            out = function(*args, **kwargs)
        else:
            out = self._constructed(function, args, kwargs)
        self._count(function, args, kwargs, tensors, out)
        return out

    def _constructed(self, function, args, kwargs):
        with self._fake_mode:
            fake = function(*args, **kwargs)
        if not isinstance(fake, FakeTensor):
            return fake
        limit = _SMALL if fake.is_floating_point() else _LARGE
        return function(*args, **kwargs) if fake.numel() <= limit else fake

    def _on_fakes(self, function, args, kwargs):
        name = function._schema.name
        if function is aten._local_scalar_dense.default:
            return torch.ones((), dtype=args[0].dtype).item()
        if function is aten.equal.default:
            return True
        if function is aten.nonzero.default:
            return self._indices(args[0])
        if function is aten.masked_select.default:
            return aten.index.Tensor(args[0], self._expanded([args[1]]))
        if name in _INNER_PRODUCTS:
            like = self._run(function, args, kwargs)
            return torch.eye(like.shape[-1], dtype=like.dtype, device=self.device).expand(like.shape)
        if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
            args = (args[0], self._expanded(args[1]), *args[2:])
        written = function._schema.arguments
        if name.startswith("aten::") and written and written[0].alias_info is not None and written[0].alias_info.is_write:
            if not isinstance(args[0], FakeTensor):
                return args[0]
        return self._run(function, args, kwargs)

    def _run(self, function, args, kwargs):
        def faked(value):
            return self.fake(value) if isinstance(value, Tensor) and not isinstance(value, FakeTensor) else value

        args, kwargs = tree_map(faked, (args, kwargs))
        with self._fake_mode:
            return function(*args, **kwargs)

    def _indices(self, mask: Tensor) -> Tensor:
        """The indices [n, dims] of a mask's set elements, of all where nothing is known."""
        if isinstance(mask, FakeTensor):
            with self._fake_mode:
                return torch.empty(mask.numel(), mask.dim(), dtype=torch.int64, device=self.device)
        return mask.nonzero()

    def _expanded(self, indices):
        """Indices without masks, as indexing makes them itself."""
        out = []
        for index in indices:
            if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                found = self._indices(index)
                self.ledger.add(found, "workspace")
                out += found.unbind(1)
            else:
                out.append(index)
        return out

    def _count(self, function, args, kwargs, tensors, out) -> None:
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if function.is_view:
            return
        kernel = costs.kernel(function)
        self.flops[kernel] += costs.flops(function, args, kwargs, out)
        self.moved[kernel] += sum(costs.nbytes(t) for t in (*tensors, *results))
        for tensor in results:
            self.ledger.add(tensor, self.phase)
        self.ledger.pulse(costs.workspace(function, args, kwargs, out))


class _Copying(TorchFunctionMode):
    """Inside, copy.deepcopy turns floating-point tensors into fakes."""

    def __init__(self, rehearsal: Rehearsal):
        super().__init__()
        self._rehearsal = rehearsal

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                real = not (tensor.is_meta or tensor.is_floating_point() and tensor.numel() > _SMALL)
                memo[id(tensor)] = tensor.clone() if real else self._rehearsal.fake(tensor)
            return memo[id(tensor)]
        if function is torch._C.TensorBase.clone:  # of a parameter
            return self._rehearsal.fake(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))
