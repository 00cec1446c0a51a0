"""Writes the parts of custom ops' schemas that are the fields of an object, which the op takes one after the other."""

from typing import get_type_hints

from torch import Tensor

_NAMES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    float | None: "float?",
    int: "SymInt",
    int | None: "SymInt?",
    bool: "bool",
    str: "str",
}


def fields(*kinds: type) -> str:
    """Return the fields of these NamedTuples as a schema lists them, and in place of a NamedTuple its own fields."""
    return ", ".join(_field(get_type_hints(kind)[name], name) for kind in kinds for name in kind._fields)


def _field(kind: type, name: str) -> str:
    return fields(kind) if hasattr(kind, "_fields") else f"{_NAMES[kind]} {name}"
