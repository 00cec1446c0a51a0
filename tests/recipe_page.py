"""The tables of moe_unlearn/recipes/README.md: every shipped recipe and every key, made from what is there.

    python -m tests.recipe_page          writes the page

A recipe is described by the comment at the head of its file. Keys, types and defaults are those of the dataclasses of
`moe_unlearn.config`, and the meaning of a key is the comment behind its field. The values that a key takes are what its
error says where the config refuses one, so that no second list of them exists.
"""

import ast
import dataclasses
import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path

from moe_unlearn.config import Recipe, shipped

PAGE = Path(__file__).resolve().parent.parent / "moe_unlearn" / "recipes" / "README.md"
_HEADER = "| key | type | values | default | meaning |\n|---|---|---|---|---|"
_TYPES = {str: "text", int: "integer", float: "number", bool: "true or false", types.NoneType: "null"}
# values of each type that are out of every range
_REFUSED = {str: ["?"], int: [-(10**9)], float: [-1e9, 1e9]}
# a key that another one must allow
_ALLOWED_BY = {
    "data": {"chat_template": True},
    "wagle": {"official": True},
    "dual": {"retain_loss_eps": 1.0},
}


def keys(cls: type = Recipe, path: str = "") -> Iterator[tuple[str, typing.Any, dataclasses.Field, str]]:
    """Yield the full name, the type, the field and the meaning of every key, in the order of the recipe."""
    hints, meanings = typing.get_type_hints(cls), _comments(cls)
    for field in sorted(dataclasses.fields(cls), key=lambda f: _section(hints[f.name]) is not None):
        section = _section(hints[field.name])
        if section is not None:
            yield from keys(section, f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}", hints[field.name], field, meanings.get(field.name, "")


def recipes() -> str:
    """Return the table of the shipped recipes."""
    lines = ["| recipe | what it is |\n|---|---|"]
    for name in shipped():
        head = PAGE.with_name(f"{name}.yaml").read_text(encoding="utf-8").partition("name:")[0]
        lines.append(f"| `{name}` | {' '.join(line.removeprefix('#').strip() for line in head.splitlines())} |")
    return "\n".join(lines)


def table() -> str:
    """Return the table of all keys."""
    lines = [_HEADER]
    for name, hint, field, meaning in keys():
        cells = f"`{name}`", _type(hint), values(name, hint), f"`{_default(field)}`", meaning
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def values(name: str, hint: typing.Any) -> str:
    """Return what the config says that a key must be, where it refuses a value."""
    section, _, key = name.rpartition(".")
    found = []
    for kind in _kinds(hint):
        for bad in _REFUSED.get(kind, []):
            inner = _ALLOWED_BY.get(section, {}) | {key: [bad] if _is_list(hint) else bad}
            message = _error({section: inner} if section else inner)
            said = re.match(rf"{re.escape(name)} must be (?:one of )?(.+?); got ", message)
            if said and said[1] not in found:
                found.append(said[1])
    return "; ".join(found) or "any"


def current(page: str) -> str:
    """Return the page with both tables as they are now. Raises ValueError unless all marks are there."""
    for name, made in {"recipes": recipes(), "recipe-keys": table()}.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, begins, rest = page.partition(begin)
        _, ends, after = rest.partition(end)
        if not begins or not ends:
            raise ValueError(f"expected {begin} and then {end} in {PAGE.name}")
        page = f"{before}{begin}\n{made}\n{end}{after}"
    return page


def _error(changes: dict) -> str:
    try:
        Recipe.from_dict(changes)
    except ValueError as error:
        return str(error)
    return ""


def _section(hint: typing.Any) -> type | None:
    return next((kind for kind in (*typing.get_args(hint), hint) if dataclasses.is_dataclass(kind)), None)


def _is_list(hint: typing.Any) -> bool:
    return typing.get_origin(hint) is list


def _kinds(hint: typing.Any) -> tuple[type, ...]:
    return typing.get_args(hint) or (hint,)


def _type(hint: typing.Any) -> str:
    named = " or ".join(_TYPES[kind] for kind in _kinds(hint))
    return f"list of {named}s" if _is_list(hint) else named


def _default(field: dataclasses.Field) -> str:
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{field.name}: no YAML for {value}")
    return str(value) if value != "" else '""'


def _comments(cls: type) -> dict[str, str]:
    """Return the comment behind each field of a dataclass."""
    source = inspect.getsource(cls)
    lines = source.splitlines()
    fields = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: lines[node.end_lineno - 1][node.end_col_offset :].partition("# ")[2] for node in fields}


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(current(page), encoding="utf-8")
    print(f"{PAGE.name} {'says so already' if current(page) == page else 'written'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
