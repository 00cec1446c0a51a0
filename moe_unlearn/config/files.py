"""Reads recipe files, which may extend each other, and keeps where every value comes from.

The layers of a recipe, the last of which counts:

    the recipe that `extends` names, a shipped one or a path beside the file, with all that this one extends
    what a model takes of its own for that recipe
    the file itself, and what the model takes for it
    overrides like `trace.eta=0.7`
"""

import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from moe_unlearn.config.values import merge, override, parse

EXTENDS = "extends"
FOLDER = resources.files("moe_unlearn") / "recipes"


@dataclass
class Composed:
    """Values of a recipe in nested dictionaries, and the origin of each by its full name; others are defaults."""

    values: dict = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def merge(self, changes: dict, origin: str) -> None:
        """Copy `changes` into the values, merging nested mappings."""
        merge(self.values, changes)
        self._note("", changes, origin)

    def override(self, text: str) -> None:
        """Set one value by a text like `trace.eta=0.7`."""
        override(self.values, text)
        name = text.partition("=")[0]
        self._forget(name)
        value: typing.Any = self.values
        for key in name.split("."):
            value = value[key]
        self._note(name, value, "--set")

    def _note(self, name: str, value: typing.Any, origin: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                self._note(f"{name}.{key}" if name else str(key), inner, origin)
        else:
            self._forget(name)
            self.origins[name] = origin

    def _forget(self, name: str) -> None:
        """Drop the origins of a section's keys, which another value of the section replaces."""
        for known in [known for known in self.origins if known.startswith(f"{name}.")]:
            del self.origins[known]


def composed(source: str | Path, overrides: Sequence[str] = (), *, model: str | None = None) -> Composed:
    """Read the shipped recipe or the file `source` with all layers; `model` is a name in `models()`.

    Raises ValueError for what is no recipe file, for an `extends` that leads back to its own file, and for a model or
    an override that cannot be.
    """
    made = Composed()
    own = {} if model is None else read_model(model).get("recipes", {})
    for name, values in reversed([*_chain(source)]):
        made.merge(values, f"recipe {name}")
        if (changes := own.get(values.get("name"))) is not None:
            made.merge(changes, f"model {model}")
    for text in overrides:
        made.override(text)
    return made


def shipped() -> tuple[str, ...]:
    """Return the names of the recipes that come with the package."""
    return _names(FOLDER)


def models() -> tuple[str, ...]:
    """Return the names of the models whose geometry and values for the recipes come with the package."""
    return _names(FOLDER / "models")


def geometry(model: str) -> dict:
    """Return the keywords of the transformers config of a model in `models()`, with `model_type` and `dtype`."""
    config: dict = read_model(model)["config"]
    return config


def description(name: str) -> str:
    """Return what a shipped recipe is, the comment at the head of its file."""
    head = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").partition("name:")[0]
    return " ".join(line.removeprefix("#").strip() for line in head.splitlines())


def read_model(name: str) -> dict:
    """Return what the package knows of a model: its `config`, and the values that `recipes` take for it."""
    if name not in models():
        raise ValueError(f"no model {name!r} among those shipped: {', '.join(models())}")
    return parse(FOLDER / "models" / f"{name}.yaml", name)


def _chain(source: str | Path) -> typing.Iterator[tuple[str, dict]]:
    """Yield the name and the values of a recipe file, then of the one that it extends, and so on."""
    seen: list[str] = []
    met: set[Path] = set()  # the files themselves, which a path such as ../here/a.yaml names anew in each round
    beside = Path()
    while True:
        known = str(source) in shipped()
        path: Traversable = FOLDER / f"{source}.yaml" if known else beside / source
        place = Path(str(path)).resolve()
        if place in met:
            raise ValueError(f"{EXTENDS} leads back to {source}: {' -> '.join([*seen, str(path)])}; leave one out")
        if not path.is_file():
            wanted = f"{EXTENDS}: " if seen else ""
            raise ValueError(
                f"{wanted}no recipe file {str(path if seen else source)!r}; shipped recipes: {', '.join(shipped())}"
            )
        seen.append(str(path))
        met.add(place)
        values = parse(path, source)
        base = values.pop(EXTENDS, None)
        yield str(source), values
        if base is None:
            return
        if not isinstance(base, str) or not base:
            raise ValueError(f"{source}: {EXTENDS} must name a shipped recipe or a file beside this one; got {base!r}")
        source, beside = base, Path() if known else Path(str(path)).parent


def _names(folder: Traversable) -> tuple[str, ...]:
    return tuple(sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")))
