"""Reading a recipe's values from YAML, merging and overriding them, making dataclasses of them and checking them.

Every error is a ValueError that names the key in full.
"""

import dataclasses
import datetime
import difflib
import math
import re
import types
import typing
from collections.abc import Collection, Iterator
from importlib.resources.abc import Traversable
from pathlib import Path

import yaml

_T = typing.TypeVar("_T")


class _Loader(yaml.SafeLoader):
    """Safe YAML loader that also refuses duplicate keys and aliases (which can expand a few lines to gigabytes)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            raise ValueError(f"{_line(self.peek_event().start_mark)}: YAML aliases are not allowed in a recipe")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise ValueError(f"{_line(node.value[i][0].start_mark)}: duplicate key {key!r} in recipe")
        values: dict = super().construct_mapping(node, deep)
        return values


def _line(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}"


def _told(error: Exception) -> str:
    """Return one line about what is wrong with a text, where the parser has several."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{_line(error.problem_mark)}: {error.problem or error.context}"
    return " ".join(str(error).split())


def parse(path: Traversable, source: str | Path) -> dict:
    """Read the mapping of a YAML file; raise ValueError that names `source` for anything else."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{source}: not a YAML recipe: {_told(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{source}: a recipe is a mapping of keys; got {type(values).__name__}")
    return values


def merge(values: dict, changes: dict) -> None:
    """Copy `changes` into `values`, merging nested mappings."""
    for key, change in changes.items():
        if isinstance(change, dict) and isinstance(values.get(key), dict):
            merge(values[key], change)
        else:
            values[key] = change


def override(values: dict, text: str) -> None:
    """Set one value of nested dictionaries by a text like `trace.eta=0.7`."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise ValueError(f"an override looks like trace.eta=0.7; got {text!r}")
    *parents, last = path.split(".")
    for key in parents:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    try:
        values[last] = yaml.load(value, Loader=_Loader)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        shown = text if len(text) < 200 else f"{text[:200]}..."
        raise ValueError(f"override {shown!r}: the value is not YAML: {_told(error)}") from error


SWITCHES = ("checkpointing",)  # keys with the words on and off, which YAML 1.1 reads as true and false


def section_of(hint: typing.Any) -> type | None:
    """Return the dataclass of a type that may be one, or None."""
    kinds = [kind for kind in (*typing.get_args(hint), hint) if isinstance(kind, type)]
    return next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)


def leaves(cls: type, path: str = "") -> Iterator[tuple[str, typing.Any, dataclasses.Field, type]]:
    """Yield the full name, the type, the field and the dataclass of every key, sections last."""
    hints = typing.get_type_hints(cls)
    assert dataclasses.is_dataclass(cls)
    for field in sorted(dataclasses.fields(cls), key=lambda own: section_of(hints[own.name]) is not None):
        section = section_of(hints[field.name])
        if section is None:
            yield f"{path}{field.name}", hints[field.name], field, cls
        else:
            yield from leaves(section, f"{path}{field.name}.")


def build(cls: type[_T], values: object, path: str = "", whole: type | None = None) -> _T:
    """Make a dataclass from nested dictionaries; raise ValueError for unknown keys and wrong types.

    `whole` is that of the whole recipe, whose keys an unknown one is told of.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{path or 'recipe'} must be a mapping of keys; got {values!r}")
    hints, whole = typing.get_type_hints(cls), whole or cls
    arguments = {}
    for key, value in values.items():
        name = f"{path}.{key}" if path else str(key)
        if key not in hints:
            near = _meant(str(key), hints, path, whole)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise ValueError(f"unknown recipe key {name!r}; {hint}valid keys: {', '.join(hints)}")
        arguments[key] = _convert(hints[key], value, name, whole)
    return cls(**arguments)


def _meant(key: str, hints: Collection[str], path: str, whole: type) -> list[str]:
    """Return the full names of keys of that very name elsewhere, else of the one here that is spelled most like it."""
    if same := [name for name, *_ in leaves(whole) if name.rpartition(".")[2] == key]:
        return same
    near = difflib.get_close_matches(key, hints, n=1, cutoff=0.4)
    return [f"{path}.{near[0]}" if path else near[0]] if near else []


def _convert(hint: typing.Any, value: typing.Any, name: str, whole: type) -> typing.Any:
    if isinstance(hint, types.UnionType):
        kinds = typing.get_args(hint)
        if value is None and type(None) in kinds:
            return None
        if {str, float} <= set(kinds):
            return _word_or_number(value, name)
        hint = next(h for h in kinds if h is not type(None))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, str) and (key := getattr(hint, "shorthand", "")):
            value = {key: value}  # `router: frozen`
        # `trace: true` is the lever with its defaults
        return hint() if value is True else build(hint, value, name, whole)
    if typing.get_origin(hint) is list:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{name} must be a list; got {value!r}")
        (item,) = typing.get_args(hint)
        return [_convert(item, v, f"{name}[{i}]", whole) for i, v in enumerate(value)]
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        # YAML 1.1 reads 1e-5 as text
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"{name} must be a number; got {value!r}") from None
    if name in SWITCHES and isinstance(value, bool):
        value = "on" if value else "off"
    if hint is str and type(value) is datetime.date:
        # YAML reads 2026-11-29 as a date
        value = value.isoformat()
    if type(value) is not hint:
        raise ValueError(f"{name} must be {hint.__name__}; got {value!r}")
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{name} must be finite; got {value}")
    return value


def _word_or_number(value: object, name: str) -> str | float:
    """Convert to a number however it is written, else to a word; YAML 1.1 reads the word off as false."""
    if value is False:
        return "off"
    try:
        number: float = _convert(float, value, name, float)
        return number
    except ValueError:
        if isinstance(value, str):
            return value
        raise ValueError(f"{name} must be a word or a finite number; got {value!r}") from None


def bytes_of(name: str, value: str | float) -> int:
    """Convert an amount of memory, a number of bytes or a text like 512MiB, to bytes; ValueError for anything else."""
    # Python writes floats from 1e16 on with an exponent
    text = f"{value:.0f}" if isinstance(value, float) and value >= 1e16 else str(value)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?\s*", text)
    if found is None or isinstance(value, bool):
        raise ValueError(f"{name} must be an amount of memory, such as 512MiB or 32GB; got {value!r}")
    number, unit = found.groups()
    base = 1024 if unit and "i" in unit else 1000
    return int(float(number) * base ** " KMGT".index(unit[0])) if unit and unit != "B" else int(float(number))


class OutOfRange(ValueError):
    """A value that a key does not take; `rule` says what it takes in words of JSON schema."""

    def __init__(self, message: str, rule: dict[str, typing.Any]):
        super().__init__(message)
        self.rule = rule


def one_of(name: str, value: object, allowed: Collection[object]) -> None:
    """Raise ValueError unless the value is one of those allowed."""
    if value not in allowed:
        raise OutOfRange(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}", {"enum": [*allowed]})


def above(name: str, value: float, low: float) -> None:
    """Raise ValueError unless value > low."""
    if not value > low:
        raise OutOfRange(f"{name} must be above {low}; got {value}", {"exclusiveMinimum": low})


def at_least(name: str, value: float, low: float) -> None:
    """Raise ValueError unless value >= low."""
    if not value >= low:
        raise OutOfRange(f"{name} must be at least {low}; got {value}", {"minimum": low})


def at_most(name: str, value: float, high: float) -> None:
    """Raise ValueError unless value <= high."""
    if not value <= high:
        shown = high if isinstance(high, int) else f"{high:g}"
        raise OutOfRange(f"{name} must be at most {shown}; got {value}", {"maximum": high})


def below(name: str, value: float, high: float) -> None:
    """Raise ValueError unless value < high."""
    if not value < high:
        raise OutOfRange(f"{name} must be below {high}; got {value}", {"exclusiveMaximum": high})


def between(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless low < value <= high."""
    if not low < value <= high:
        raise OutOfRange(f"{name} must be in ({low}, {high}]; got {value}", {"exclusiveMinimum": low, "maximum": high})
