"""Turns nested states into JSON and the tensors in them, and back.

A tensor is stood for by its name. A dict becomes a list of pairs, so that integer keys, which optimizers use, survive.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

_TENSOR, _DICT, _TUPLE = "__tensor__", "__dict__", "__tuple__"
Path = tuple[str | int, ...]


def split(value: object, add: Callable[[Path, Any], str], path: Path = ()) -> Any:
    """Return `value` with each leaf that JSON does not hold replaced by the name that `add(path, leaf)` returns."""
    if isinstance(value, Mapping):
        return {_DICT: [[key, split(item, add, (*path, key))] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [split(item, add, (*path, i)) for i, item in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return {_TENSOR: add(path, value)}


def join(tree: Any, take: Callable[[str, Any], Any], into: Any = None, path: Path = ()) -> Any:
    """Undo `split`: replace each name by `take(name, target)`.

    The target is what `into`, a tree of the same form or a part of one, holds at that place: what is no dict, list or
    tuple is the target of all below it. Raises ValueError, naming the place, for a target at a place `tree` lacks.
    """
    if isinstance(tree, dict) and _TENSOR in tree:
        return take(tree[_TENSOR], into)
    if isinstance(tree, dict) and _DICT in tree:
        if isinstance(into, Mapping):
            for key in into.keys() - {key for key, _ in tree[_DICT]}:
                raise ValueError(f"it has no {readable((*path, key))}")
        return {key: join(item, take, _at(into, key), (*path, key)) for key, item in tree[_DICT]}
    if isinstance(tree, dict):
        return tuple(join(tree[_TUPLE], take, into, path))
    if isinstance(tree, list):
        return [join(item, take, _at(into, i), (*path, i)) for i, item in enumerate(tree)]
    return tree


def merged(trees: Sequence[Any], path: Path = ()) -> Any:
    """Merge what `split` returned on several ranks: dicts may have other keys, what several have must be equal.

    Raises ValueError, naming the place.
    """
    first = trees[0]
    if all(isinstance(tree, dict) and _DICT in tree for tree in trees):
        found: dict[str | int, list] = {}
        for tree in trees:
            for key, item in tree[_DICT]:
                found.setdefault(key, []).append(item)
        return {_DICT: [[key, merged(items, (*path, key))] for key, items in found.items()]}
    if all(isinstance(tree, list) and len(tree) == len(first) for tree in trees):
        return [merged(items, (*path, i)) for i, items in enumerate(zip(*trees, strict=True))]
    if all(isinstance(tree, dict) and _TUPLE in tree for tree in trees):
        return {_TUPLE: merged([tree[_TUPLE] for tree in trees], path)}
    # not ==, to which NaN is no equal of itself, and 1 of True
    if any(repr(tree) != repr(first) for tree in trees):
        raise ValueError(f"expected {readable(path)} to be the same on all ranks; they differ")
    return first


def chosen(tree: Any, keys: Collection[str]) -> Any:
    """Return a tree that is a dict with the entries `keys` alone; raise ValueError for one that it lacks."""
    entries = dict(tree[_DICT])
    for key in keys:
        if key not in entries:
            raise ValueError(f"it has no {key}")
    return {_DICT: [[key, entries[key]] for key in keys]}


def keys_of(tree: Any) -> list[str]:
    """Return the keys of a tree that is a dict."""
    return [key for key, _ in tree[_DICT]]


def name_of(path: Path) -> str:
    """Return the name of a leaf: different places have different names."""
    return json.dumps(path)


def readable(place: Path | str) -> str:
    """Return a place, or the name of a leaf, as messages have it."""
    path = json.loads(place) if isinstance(place, str) else place
    return "/".join(map(str, path)) or "the state"


def _at(into: Any, key: Any) -> Any:
    if isinstance(into, Mapping):
        return into.get(key)
    if isinstance(into, list | tuple):
        return into[key] if key < len(into) else None
    return into
