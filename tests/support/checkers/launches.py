"""Launches under observation: the hooks in Triton's interpreter; nothing else touches its private names.

Within `watch`, every launch may have its tensors moved between guard pages, its programs run in another order,
or only some of them, and its memory accesses traced:

Bounds      every address used is an element of an argument, not a hole between the rows of a view
Conflicts   no two programs of a launch write one address, none reads what another writes
Atomics     no float atomics, integer ones only where declared
Hazards     no program reads what it wrote without a barrier, no store writes two values to one address

Programs that race in shared memory or inside one instruction are not seen: that takes a GPU and
compute-sanitizer.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

from tests.support.checkers.child import about_to_run
from tests.support.checkers.memory import Mapping, extent

SHOWN = 4  # addresses named per finding


def map_tensors(value, function: Callable[[Tensor], Tensor]):
    """`value` with every tensor in it, inside lists, tuples, dicts and descriptors, replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, interpreter.TensorDescriptor):
        rest = (value.shape, value.strides, value.block_shape, value.padding, value.round_f32_to_tf32)
        return interpreter.TensorDescriptor(function(value.base), *rest)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [map_tensors(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def tensors_in(value) -> list[Tensor]:
    """Every tensor inside `value`, in order."""
    found: list[Tensor] = []
    map_tensors(value, lambda tensor: (found.append(tensor), tensor)[1])
    return found


class Watch:
    """Says what is done with each launch inside `watch`, and what was found."""

    def __init__(self, edge, alignment, order, programs, trace, integer_atomics, known):
        self.edge, self.alignment, self.programs = edge, alignment, programs
        self.trace, self.integer_atomics, self.known = trace, integer_atomics, known
        self.shuffle = None if order is None else np.random.default_rng(order)
        self.findings: list[str] = []
        self.launches: dict[str, int] = {}  # kernel name -> how often it was launched

    def begin(self, name: str, arguments: dict):
        """The arguments as the kernel gets them."""
        self.name, self.mappings, self.places = name, [], []
        self.launches[name] = self.launches.get(name, 0) + 1
        self.reads, self.writes, self.own, self.atomics = [], [], [], []
        about_to_run(name)
        if self.edge is not None:
            self.mappings = self._guard(tensors_in(arguments))
        moved = map_tensors(arguments, self._moved)
        self.places = [(key, tensor) for key, value in moved.items() for tensor in tensors_in(value)]
        return moved

    def _guard(self, tensors: list[Tensor]) -> list[Mapping]:
        """One mapping per group of tensors that share memory."""
        groups: list[list[int]] = []
        for start, stop in sorted(extent(t) for t in tensors if t.numel()):
            if groups and start < groups[-1][1]:
                groups[-1][1] = max(stop, groups[-1][1])
            else:
                groups.append([start, stop])
        return [Mapping(*group, self.edge, self.alignment) for group in groups]

    def _moved(self, tensor: Tensor) -> Tensor:
        for mapping in self.mappings:
            if tensor.numel() and mapping.source <= tensor.data_ptr() < mapping.source + mapping.size:
                return mapping.moved(tensor)
        return tensor

    def plan(self, grid: tuple) -> tuple[int]:
        """The grid to loop over: one entry per program that runs."""
        self.grid = tuple(grid) + (1,) * (3 - len(grid))
        if self.programs is not None:
            self.ids = list(self.programs(self.name, self.grid))
        else:
            self.ids = list(itertools.product(*map(range, self.grid)))
        if self.shuffle is not None:
            self.ids = [self.ids[i] for i in self.shuffle.permutation(len(self.ids))]
        return (len(self.ids),)

    def start_program(self, position: int) -> tuple:
        self.position, self.own = position, []
        about_to_run(f"{self.name}, program {self.ids[position]}")
        return self.ids[position]

    def end(self) -> None:
        if self.trace:
            self._judge()
        for mapping in self.mappings:
            if mapping.gaps_touched():
                names = (name for name, tensor in self.places if mapping.holds(tensor))
                self._report(f"writes outside {', '.join(names)}")
            mapping.write_back()
            mapping.close()

    # the tracer

    def read(self, address: np.ndarray) -> None:
        self.reads.append((self.position, address))
        if self.own and np.isin(address, np.concatenate(self.own)).any():
            self._report(f"program {self.ids[self.position]} reads what it wrote, without a barrier", address[:1])

    def write(self, address: np.ndarray, value: np.ndarray) -> None:
        self.writes.append((self.position, address))
        self.own.append(address)
        if len(np.unique(address)) < len(address):
            # compared as bits: NaN differs from itself
            bits = value.view(f"u{value.dtype.itemsize}") if value.dtype != bool else value
            pairs = np.unique(np.stack([address, bits.astype(np.int64)]), axis=1)
            if len(np.unique(pairs[0])) < pairs.shape[1]:
                self._report("one store writes two values to one address", address[:1])

    def atomic(self, address: np.ndarray, integer: bool, operation: str) -> None:
        if not integer:
            self._report(f"float atomic ({operation})", address[:1])
        elif not self.integer_atomics:
            self._report(f"undeclared integer atomic ({operation})", address[:1])
        self.atomics.append((self.position, address))

    def _judge(self) -> None:
        """Cross-program conflicts and addresses outside every argument, at the end of a launch."""
        (read, reader), (write, writer), (atomic, changer) = map(_merged, (self.reads, self.writes, self.atomics))
        address, count = np.unique(write, return_counts=True)
        self._report_any("two programs write", address[count > 1])
        self._report_any("a program reads what another writes", _conflicts(read, reader, write, writer))
        plain = np.concatenate([read, write]), np.concatenate([reader, writer])
        self._report_any("a plain access meets another program's atomic", _conflicts(*plain, atomic, changer))
        for verb, used in (("reads", read), ("writes", write), ("changes", atomic)):
            self._report_any(f"{verb} outside every tensor", self._outside(np.unique(used)))

    def _outside(self, address: np.ndarray) -> np.ndarray:
        for tensor in [t for _, t in self.places] + self.known:
            if not len(address):
                break
            start, stop = extent(tensor)
            inside = (address >= start) & (address < stop)
            if not tensor.is_contiguous() and inside.any():
                offsets = torch.arange(1 + (stop - start) // tensor.element_size())
                used = offsets.as_strided(tensor.shape, tensor.stride()).numpy().ravel()
                inside &= np.isin(address, start + used * tensor.element_size())
            address = address[~inside]
        return address

    def _report_any(self, what: str, address: np.ndarray) -> None:
        if len(address):
            self._report(f"{what}, {len(address)} addresses", address)

    def _report(self, what: str, address=()) -> None:
        places = ", ".join(self._place(int(a)) for a in address[:SHOWN])
        finding = f"{self.name}: {what}" + (f": {places}" if places else "")
        if finding not in self.findings:
            self.findings.append(finding)

    def _place(self, address: int) -> str:
        """`name[element]`, counted in elements from the start of the nearest tensor."""

        def distance(place):
            start, stop = extent(place[1])
            return max(start - address, address - stop + 1, 0)

        if not self.places:
            return "?"
        name, tensor = min(self.places, key=distance)
        return f"{name}[{(address - tensor.data_ptr()) / tensor.element_size():g}]"


def _merged(accesses: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """(addresses, programs), each pair once."""
    if not accesses:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    address = np.concatenate([a for _, a in accesses])
    program = np.concatenate([np.full(len(a), p) for p, a in accesses])
    pairs = np.unique(np.stack([address, program]), axis=1)
    return pairs[0], pairs[1]


def _conflicts(address, program, written, writer) -> np.ndarray:
    """Addresses that one program uses and another writes; each (address, program) pair stands once."""
    pairs = np.stack([np.concatenate([address, written]), np.concatenate([program, writer])])
    pairs = np.unique(pairs[:, np.isin(pairs[0], np.intersect1d(address, written))], axis=1)
    value, count = np.unique(pairs[0], return_counts=True)
    return value[count > 1]


@contextlib.contextmanager
def watch(
    *,
    edge: str | None = None,
    alignment: int = 1,
    order: int | None = None,
    programs: Callable[[str, tuple], list] | None = None,
    trace: bool = False,
    integer_atomics: bool = False,
    known: list[Tensor] = (),
) -> Iterator[Watch]:
    """Every launch inside runs under the checks asked for.

    Args:
        edge: "end" or "start", where the tensors stand between guard pages; None leaves them where they are.
        alignment: bytes; an address keeps its remainder modulo it (tensor descriptors need 16).
        order: seed of the random order of programs.
        programs: (kernel name, grid) -> the program ids (x, y, z) to run, in this order; None runs all.
        trace: bounds, conflicts and atomics.
        known: tensors that kernels may reach without being given them, through tables of addresses.
    """
    state = Watch(edge, alignment, order, programs, trace, integer_atomics, list(known))
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor

    class Executor(executor):
        def __call__(self, *arguments, **keywords):
            real = self.grid
            self.grid = lambda bound: state.plan(real(bound) if callable(real) else real)
            super().__call__(*arguments, **keywords)

        def _init_args_hst(self, arguments, keywords):
            names = self.arg_names[: len(arguments)]
            moved = state.begin(self.fn.__name__, dict(zip(names, arguments, strict=True)) | keywords)
            return [moved.pop(name) for name in names], moved

        def _restore_args_dev(self, *unused):
            state.end()

    def set_grid_dim(*unused):
        return type(builder).set_grid_dim(builder, *state.grid)

    def set_grid_idx(position, *unused):
        return type(builder).set_grid_idx(builder, *state.start_program(position))

    def load(pointer, mask, *rest, **keywords):
        state.read(_used(pointer, mask))
        return type(builder).create_masked_load(builder, pointer, mask, *rest, **keywords)

    def store(pointer, value, mask, *rest, **keywords):
        keep = _lanes(mask, pointer)
        state.write(_used(pointer, mask), np.broadcast_to(value.data, pointer.data.shape).reshape(-1)[keep])
        return type(builder).create_masked_store(builder, pointer, value, mask, *rest, **keywords)

    def rmw(operation, pointer, value, mask, *rest, **keywords):
        integer = np.issubdtype(value.data.dtype, np.integer) and not value.dtype.scalar.is_floating()
        state.atomic(_used(pointer, mask), integer, str(operation).rpartition(".")[2])
        return type(builder).create_atomic_rmw(builder, operation, pointer, value, mask, *rest, **keywords)

    def cas(pointer, *rest, **keywords):
        state.atomic(_used(pointer, None), True, "cas")
        return type(builder).create_atomic_cas(builder, pointer, *rest, **keywords)

    def barrier():
        state.own = []

    hooks = {"set_grid_dim": set_grid_dim, "set_grid_idx": set_grid_idx}
    if trace:
        hooks |= {
            "create_masked_load": load,
            "create_masked_store": store,
            "create_atomic_rmw": rmw,
            "create_atomic_cas": cas,
            "create_barrier": barrier,
        }
    try:
        interpreter.GridExecutor = Executor
        for name, hook in hooks.items():
            setattr(builder, name, hook)
        yield state
    finally:
        interpreter.GridExecutor = executor
        for name in hooks:
            delattr(builder, name)


def _lanes(mask, pointer) -> np.ndarray:
    return np.broadcast_to(mask.data, pointer.data.shape).reshape(-1).astype(bool)


def _used(pointer, mask) -> np.ndarray:
    """The addresses of the lanes that take part."""
    address = pointer.data.reshape(-1).astype(np.int64)
    return address if mask is None else address[_lanes(mask, pointer)]
