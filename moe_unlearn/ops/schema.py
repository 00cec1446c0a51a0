"""Writes the parts of custom ops' schemas that are the fields of an object, which the op takes one after the other."""

from typing import Any, get_type_hints

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
    return ", ".join(_field(hint, name) for kind in kinds for name, hint in get_type_hints(kind).items())


def _field(kind: Any, name: str) -> str:
    return fields(kind) if hasattr(kind, "_fields") else f"{_NAMES[kind]} {name}"
