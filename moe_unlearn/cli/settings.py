"""`moe-unlearn recipes`, `show`, `schema` and `completion`: which settings there are, and what they are."""

import argparse
import json
import re
from collections.abc import Iterator
from typing import Any

from moe_unlearn.config import Recipe, keys, shipped
from moe_unlearn.config.files import composed, description
from moe_unlearn.page.terminal import wrapped

_OFF = "off; its name with =true switches it on"


def recipes(options: argparse.Namespace) -> None:
    """List the shipped recipes, a line each, by the name that `run` takes."""
    found = {name: description(name) for name in shipped()}
    if options.json:
        print(json.dumps(found, indent=1))
        return
    for name, text in found.items():
        print(f"{name:<20} {re.split(r'[.;] ', text, maxsplit=1)[0].rstrip('.')}")


def show(options: argparse.Namespace) -> None:
    """Show every key of a recipe with its value, where that comes from, the values it takes and what it means."""
    found = [*rows(options.recipe, options.set, options.model)]
    if options.json:
        print(json.dumps({row.pop("key"): row for row in found}, indent=1))
        return
    meanings = (row["meaning"] + (f" ({row['values']})" if row["values"] != "any" else "") for row in found)
    texts = [
        (row["key"], keys.shown(row["value"]), row["origin"], meaning)
        for row, meaning in zip(found, meanings, strict=True)
    ]
    print(*wrapped(texts), sep="\n")


def schema(options: argparse.Namespace) -> None:
    """Print the JSON schema of recipe files, by which an editor completes and checks them."""
    print(json.dumps(keys.json_schema(), indent=1))


def completion(options: argparse.Namespace) -> None:
    """Print what a shell needs to complete verbs, options and recipes; it takes the library argcomplete."""
    try:
        import argcomplete
    except ImportError as error:
        raise ValueError('completion needs argcomplete: pip install "moe-unlearn[completion]"') from error
    print(argcomplete.shellcode(["moe-unlearn"], True, options.shell))


def rows(source: str, overrides: list[str], model: str | None) -> Iterator[dict[str, Any]]:
    """Yield key, value, origin, values, default and meaning of each key; of a section that is off one row says so.

    Raises ValueError as `Recipe.load` does.
    """
    made = composed(source, overrides, model=model)
    chosen = Recipe.from_dict(made.values).to_dict()
    meanings, said = keys.section_meanings(), set()
    for key in keys.table():
        section, _, name = key.name.rpartition(".")
        own = chosen[section] if section else chosen
        if own is None:
            if section not in said:
                said.add(section)
                row = {"key": section, "value": None, "origin": made.origins.get(section, "default")}
                yield row | {"values": _OFF, "default": None, "meaning": meanings[section]}
            continue
        # one word for a section, such as `router: frozen`, is where the values come from that are no defaults
        of_section = made.origins.get(section, "default") if own[name] != key.default else "default"
        # a mapping, such as `trainer`, comes from wherever its own keys do
        inside = dict.fromkeys(origin for full, origin in made.origins.items() if full.startswith(f"{key.name}."))
        origin = made.origins.get(key.name, ", ".join(inside) or of_section)
        row = {"key": key.name, "value": own[name], "origin": origin}
        yield row | {"values": key.values, "default": key.default, "meaning": key.meaning}
