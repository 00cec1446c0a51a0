"""Knobs that make a run fit a device, cheapest first, and the search for those that suffice.

The order is that of how little a knob changes: first what changes no number and costs time (`checkpointing`,
micro-batches, the mask's budget), then what rounds the optimizer's state, then what trains fewer weights. Ranks that
share the weights out change no formula, but take further devices, and are named apart. Whatever is suggested has been
planned, and the plan said that it fits.
"""

import shlex
from collections.abc import Callable, Iterator
from typing import NamedTuple

from moe_unlearn.config import Recipe
from moe_unlearn.config.values import override
from moe_unlearn.plan.mesh import Mesh
from moe_unlearn.plan.plan import Plan

MESHES = ("fsdp=2", "fsdp=4", "fsdp=8", "fsdp=8,ep=8")
#: (overrides of the recipe, mesh) -> the plan; ValueError for what the model or the recipe does not allow
Planned = Callable[[list[str], str | None], Plan]


class Knob(NamedTuple):
    """One change of a recipe; of several with a name the later replaces the earlier."""

    name: str
    overrides: tuple[str, ...]


def changed(recipe: Recipe, overrides: list[str]) -> Recipe:
    """Return a recipe with overrides such as `checkpointing=on`; ValueError for what it does not allow."""
    values = recipe.to_dict()
    for text in overrides:
        override(values, text)
    return Recipe.from_dict(values)


def knobs(recipe: Recipe, layers: int, size: float) -> Iterator[Knob]:
    """Yield what may be changed in a recipe for a model of so many layers, and a device of `size` GiB, cheapest first.

    A batch becomes micro-batches of the same rows, whose step is the same. The state of the optimizer is rounded. Last
    come the experts that TRACE selects, where it runs, and the experts of the top quarter of the layers.
    """
    if recipe.checkpointing != "on":
        yield Knob("checkpointing", ("checkpointing=on",))
    for parts in (2, 4, 8):
        if recipe.batch_size % parts == 0:
            rows = f"batch_size={recipe.batch_size // parts}"
            yield Knob("micro-batches", (rows, f"accumulate={recipe.accumulate * parts}"))
    if recipe.wagle is not None and recipe.wagle.mask is None:
        for part in (8, 64):
            yield Knob("mask", (f"wagle.memory={size * 1024 / part:g}MiB",))
    if recipe.optimizer.state == "float32" and recipe.optimizer.name == "adamw":
        for state in ("bfloat16", "int8"):
            yield Knob("state", (f"optimizer.state={state}",))
    if recipe.scope.kind == "all":
        if recipe.trace is not None:
            yield Knob("scope", ("scope.kind=experts",))
        top = "|".join(map(str, range(layers - max(layers // 4, 1), layers)))
        yield Knob("scope", ("scope.kind=parameters", rf"scope.parameters=['layers\.({top})\..*experts']"))


def remedies(planned: Planned, plan: Plan, recipe: Recipe, size: float) -> list[str]:
    """Return in lines what makes a run fit a device of `size` GiB on which its plan does not, or that nothing does."""
    weights, room = plan.memory.get("weights", 0), size * 2**30
    if plan.mesh is not None and weights > room:
        return [f"the weights of a rank alone take {weights / 2**30:.3g} GiB: no knob of the recipe makes it fit"]
    # no knob makes the weights smaller
    chosen, fitting = ({}, False) if weights > room else _on_one(planned, plan, recipe, size)
    lines = []
    if fitting:
        lines.append(f"it fits with {_options(chosen)}")
    for overrides in [[], *([[*_texts(chosen)]] if chosen else [])] if plan.mesh is None else []:
        wide = [mesh for mesh in MESHES if weights / Mesh.parse(mesh).fsdp <= room]
        mesh = next((mesh for mesh in wide if _fits(planned, overrides, mesh, size)), None)
        if mesh is not None:
            ranks = f"--mesh {mesh} {_options(chosen) if overrides else ''}".strip()
            lines.append(f"{'or' if fitting else 'it fits'} on several devices with {ranks}")
            break
    if not fitting:
        lines.insert(0, "no knob of the recipe makes it fit" + (" on one device" if plan.mesh is None else ""))
    return lines


def _on_one(planned: Planned, plan: Plan, recipe: Recipe, size: float) -> tuple[dict[str, Knob], bool]:
    """Return the knobs that lower the peak, as few as make it fit on this mesh, and whether they do."""
    mesh = None if plan.mesh is None else f"fsdp={plan.mesh.fsdp},ep={plan.mesh.ep}"
    chosen: dict[str, Knob] = {}
    peak = sum(plan.on(size).values())
    for knob in knobs(recipe, plan.layers, size):
        tried = chosen | {knob.name: knob}
        try:
            made = planned([*_texts(tried)], mesh)
        except ValueError:
            continue  # the recipe or the mesh refuses it
        lower = sum(made.on(size).values())
        if lower >= peak:
            continue
        chosen, peak = tried, lower
        if not made.fits_on(size):
            continue
        for name in [name for name in reversed(chosen) if name != knob.name]:
            fewer = {other: knob for other, knob in chosen.items() if other != name}
            if _fits(planned, [*_texts(fewer)], mesh, size):
                chosen = fewer
        return chosen, True
    return chosen, False


def _fits(planned: Planned, overrides: list[str], mesh: str | None, size: float) -> bool:
    try:
        return planned(overrides, mesh).fits_on(size)
    except ValueError:
        return False


def _texts(chosen: dict[str, Knob]) -> Iterator[str]:
    for knob in chosen.values():
        yield from knob.overrides


def _options(chosen: dict[str, Knob]) -> str:
    """Return the options of the command line that turn the knobs."""
    return f"--set {' '.join(map(shlex.quote, _texts(chosen)))}"
