"""One call of an op under every check.

Guard pages   every tensor of every launch ends at an unreadable page, then begins at one
Coverage      memory from `torch.empty` and its kin is filled with one byte, then with another: an element that
              nothing wrote, or that depends on one, differs
Order         programs run in random orders: the bits stay
Tracer        bounds, conflicts, atomics and hazards, see `launches`
Arguments     what the call does not declare to change stays bitwise the same
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests.support.checkers.child import in_child
from tests.support.checkers.launches import map_tensors, tensors_in, watch
from tests.support.checkers.memory import filled, guarded


class Case(NamedTuple):
    """A call to be examined: `function(**arguments)` returns a tensor or a tuple of them."""

    function: Callable
    arguments: Mapping[str, object]
    mutates: tuple[str, ...] = ()  # the arguments whose tensors the call may change
    integer_atomics: bool = False
    reference: Callable | None = None  # the same call by another implementation, for the same bits


RUNS = {
    "as it is": dict(edge="end", byte=0xFF, trace=True),
    "with other bytes in uninitialised memory, in another order": dict(edge="start", byte=0x3C, order=1),
    "in another order": dict(edge="end", byte=0xFF, order=2),
}


def findings(case: Case, *, alignment: int = 1) -> list[str]:
    """Return what is wrong with the launches of `case`; empty if nothing is.

    Args:
        alignment: bytes; tensors keep their addresses modulo it, as tensor descriptors need (16).
    """
    return list(dict.fromkeys(in_child(lambda: _examine(case, alignment))))


def _examine(case: Case, alignment: int) -> Iterator[str]:
    first = None
    if case.reference is not None:
        arguments = map_tensors(dict(case.arguments), torch.clone)
        first = _results(case, arguments, tensors_in(case.reference(**arguments)))
    for run, options in RUNS.items():
        arguments = map_tensors(dict(case.arguments), lambda t, e=options["edge"]: guarded(t, e, alignment))
        options = options | {"alignment": alignment, "integer_atomics": case.integer_atomics}
        with filled(options.pop("byte")), watch(known=tensors_in(arguments), **options) as seen:
            outputs = tensors_in(case.function(**arguments))
        yield from seen.findings
        if not seen.launches:
            yield "nothing was launched"
        for name, value in arguments.items():
            now, before = ([bits(t) for t in tensors_in(v)] for v in (value, case.arguments[name]))
            if name not in case.mutates and now != before:
                yield f"{run}: {name} was changed"
        after = _results(case, arguments, outputs)
        first = first or after
        for name in after:
            a, b = (np.frombuffer(results[name], np.uint8) for results in (first, after))
            different = np.flatnonzero(a != b)
            if len(different):
                yield f"{run}: {name} differs in {len(different)} bytes, first at {different[0]} of {len(a)}"


def _results(case: Case, arguments: dict, outputs: list[Tensor]) -> dict[str, bytes]:
    """Return what the call returned and what it changed, as bytes."""
    after = {f"output {i}": bits(tensor) for i, tensor in enumerate(outputs)}
    return after | {name: b"".join(map(bits, tensors_in(arguments.get(name)))) for name in case.mutates}


def bits(tensor: Tensor) -> bytes:
    """Its elements as bytes, in order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
