"""The keys of a recipe in one table: name, type, values, default and meaning, made from the config itself.

A key is a field of a dataclass of `moe_unlearn.config`: its type and default are the field's, its meaning is the
comment behind it, and the values that it takes are what the config says where it refuses one. So a new key is one line
with a comment, and its check. The page of the recipes, `moe-unlearn show` and the JSON schema are made from this table.
"""

import ast
import dataclasses
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Iterator

from moe_unlearn.config.files import EXTENDS
from moe_unlearn.config.recipe import Recipe
from moe_unlearn.config.values import SWITCHES, OutOfRange, leaves, section_of

_TYPES = {str: "text", int: "integer", float: "number", bool: "true or false", dict: "mapping", types.NoneType: "null"}
_JSON = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object", types.NoneType: "null"}
# values of each type that are out of every range
_REFUSED: dict[type, list[typing.Any]] = {str: ["?"], int: [-(10**9)], float: [-1e9, 1e9]}
# a key that another one must allow
_ALLOWED_BY: dict[str, dict[str, typing.Any]] = {
    "data": {"chat_template": True},
    "wagle": {"official": True},
    "dual": {"retain_loss_eps": 1.0},
}


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a recipe by its full name; `hint` is its type as Python has it."""

    name: str
    hint: typing.Any
    default: typing.Any
    meaning: str

    @property
    def kind(self) -> str:
        """Return the type in words."""
        named = " or ".join(_TYPES[kind] for kind in self._kinds)
        return f"list of {named}s" if self._is_list else named

    @property
    def values(self) -> str:
        """Return what the config says that the key must be, where it refuses a value."""
        said = [re.match(rf"{re.escape(self.name)} must be (?:one of )?(.+?); got ", f"{e}") for e in self._refusals]
        return "; ".join(dict.fromkeys(found[1] for found in said if found)) or "any"

    @property
    def schema(self) -> dict[str, typing.Any]:
        """Return the JSON schema of the values."""
        rules: dict[str, typing.Any] = {}
        for error in self._refusals:
            if isinstance(error, OutOfRange) and f"{error}".startswith(f"{self.name} "):
                rules |= error.rule
        kinds = [_schema_of(kind, rules) for kind in self._kinds]
        if self._is_list:
            kinds = [{"type": "array", "items": kinds[0]}]
        if self.name in SWITCHES or {str, float} <= {*self._kinds}:
            kinds.append({"type": "boolean"})  # the words on and off, as YAML 1.1 reads them
        one = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
        return one | {"description": self.meaning, "default": self.default}

    @property
    def _is_list(self) -> bool:
        return typing.get_origin(self.hint) is list

    @property
    def _kinds(self) -> tuple[type, ...]:
        return typing.get_args(self.hint) or (self.hint,)

    @functools.cached_property
    def _refusals(self) -> list[ValueError]:
        """Return the errors of the config for values out of every range."""
        section, _, key = self.name.rpartition(".")
        found = []
        for bad in (bad for kind in self._kinds for bad in _REFUSED.get(kind, [])):
            inner = _ALLOWED_BY.get(section, {}) | {key: [bad] if self._is_list else bad}
            try:
                Recipe.from_dict({section: inner} if section else inner)
            except ValueError as error:
                found.append(error)
        return found


@functools.cache
def table() -> tuple[Key, ...]:
    """Return every key, in the order of the recipe, sections last."""
    return tuple(
        Key(name, hint, _default(field), _comments(cls).get(field.name, ""))
        for name, hint, field, cls in leaves(Recipe)
    )


def section_meanings() -> dict[str, str]:
    """Return the first sentence about each section of a recipe by its name."""
    hints = typing.get_type_hints(Recipe)
    sections = {name: section for name, hint in hints.items() if (section := section_of(hint)) is not None}
    return {name: _sentence(section.__doc__ or "") for name, section in sections.items()}


def json_schema() -> dict[str, typing.Any]:
    """Return the JSON schema of a recipe file, of draft 2020-12."""
    hints = typing.get_type_hints(Recipe)
    properties: dict[str, typing.Any] = {
        EXTENDS: {"type": "string", "description": "a shipped recipe, or a file beside this one, that this one changes"}
    }
    for name, meaning in section_meanings().items():
        own = {key.name.partition(".")[2]: key.schema for key in table() if key.name.startswith(f"{name}.")}
        kinds = [_object(own), {"const": True}]
        if types.NoneType in typing.get_args(hints[name]):
            kinds.append({"type": "null"})
        properties[name] = {"anyOf": kinds, "description": meaning}
    properties |= {key.name: key.schema for key in table() if "." not in key.name}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "a recipe of moe-unlearn"}
    return head | _object(properties)


def shown(value: typing.Any) -> str:
    """Return a value as a recipe has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"no YAML for {value}")
    return str(value) if value != "" else '""'


def _object(properties: dict[str, typing.Any]) -> dict[str, typing.Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _schema_of(kind: type, rules: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """Return the schema of one type, with those rules that are of it."""
    words = {"enum"}
    own = {rule: value for rule, value in rules.items() if (rule in words) == (kind is str)}
    return {"type": _JSON[kind]} | (own if kind in (str, int, float) else {})


def _default(field: dataclasses.Field) -> typing.Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    assert field.default_factory is not dataclasses.MISSING  # every key has a default
    return field.default_factory()


def _sentence(text: str) -> str:
    return re.split(r"(?<=[.;])\s", " ".join(text.split()), maxsplit=1)[0].rstrip(".;")


@functools.cache
def _comments(cls: type) -> dict[str, str]:
    """Return the comment behind each field of a dataclass."""
    source = inspect.getsource(cls)
    lines = source.splitlines()
    [defined] = ast.parse(source).body
    assert isinstance(defined, ast.ClassDef)
    return {name: lines[line - 1][column:].partition("# ")[2] for name, line, column in _fields(defined)}


def _fields(defined: ast.ClassDef) -> Iterator[tuple[str, int, int]]:
    """Yield the name of each field, and where it ends."""
    for node in defined.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node.end_lineno or 0, node.end_col_offset or 0
