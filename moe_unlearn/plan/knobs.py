"""Knobs that make a run fit a device, cheapest first, and the search for those that suffice.

The order is that of how little a knob changes: first what changes no number and costs time (`checkpointing`,
micro-batches, the mask's budget), then what rounds the optimizer's state, then its place on the host, which costs a
copy there and back every step, then what trains fewer weights. Ranks that share the weights out change no formula, but
take further devices, and are named apart. Whatever is suggested has been planned, and the plan said that it fits.
"""

import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from itertools import groupby
from typing import NamedTuple

import torch

from moe_unlearn.config import Recipe
from moe_unlearn.config.values import override
from moe_unlearn.offload import is_apart
from moe_unlearn.plan.plan import Plan

MESHES = ("fsdp=2", "fsdp=4", "fsdp=8", "fsdp=8,ep=8")
#: (overrides of the recipe, mesh) -> the plan, or bytes that its peak has at least
Planned = Callable[[tuple[str, ...], str | None], Plan]
Bounded = Callable[[tuple[str, ...], str | None], int]


class Knob(NamedTuple):
    """One change of a recipe; of several with a name the later replaces the earlier.

    Of those with a name the last has the lowest peak, but for the scopes, of which either may.
    """

    name: str
    overrides: tuple[str, ...]


def changed(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    """Return a recipe with overrides such as `checkpointing=on`; ValueError for what it does not allow."""
    values = recipe.to_dict()
    for text in overrides:
        override(values, text)
    return Recipe.from_dict(values)


def knobs(recipe: Recipe, layers: int, size: float, *, apart: bool) -> Iterator[Knob]:
    """Yield what may be changed in a recipe for a model of so many layers, and a device of `size` GiB, cheapest first.

    apart: whether the device has a memory of its own, so that the optimizer's state may lie on the host.

    A batch becomes micro-batches of the same rows, whose step is the same. The state of the optimizer is rounded. Last
    come the experts that TRACE selects, where it runs, and the experts of the top quarter of the layers.
    """
    if not recipe.recomputes:
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
    if apart and not recipe.optimizer.offload:
        yield Knob("offload", ("optimizer.offload=true",))
    if recipe.scope.kind == "all":
        if recipe.trace is not None:
            yield Knob("scope", ("scope.kind=experts",))
        top = "|".join(map(str, range(layers - max(layers // 4, 1), layers)))
        yield Knob("scope", ("scope.kind=parameters", rf"scope.parameters=['layers\.({top})\..*experts']"))


class Search:
    """The search for knobs that make a run fit: plans and bounds, each made once.

    `planned` makes the plan with overrides of the recipe on a mesh. `at_least` bounds its peak from below in little
    time (`known.at_least`). Both raise ValueError for what the model or the recipe does not allow.
    """

    def __init__(self, planned: Planned, at_least: Bounded, recipe: Recipe):
        self._planned, self._at_least, self.recipe = cache(planned), cache(at_least), recipe

    def plan(self, overrides: Sequence[str] = (), mesh: str | None = None) -> Plan:
        """Return the plan with overrides of the recipe on a mesh."""
        return self._planned(tuple(overrides), mesh)

    def remedies(self, plan: Plan, size: float) -> list[str]:
        """Return in lines what makes a run fit a device of `size` GiB on which `plan` does not; or that nothing does.

        `plan` has no overrides.
        """
        weights = plan.memory.get("weights", 0)
        if plan.mesh is not None and weights > size * 2**30:
            return [f"the weights of a rank alone take {weights / 2**30:.3g} GiB: no knob of the recipe makes it fit"]
        chosen, fitting = self._on_one(plan, size)
        lines = []
        if fitting:
            lines.append(f"it fits with {_options(chosen)}")
        further = [[], [*_texts(chosen)]] if plan.mesh is None else []
        if fitting:  # several devices are named where one takes another experiment
            further = further[:1] if "scope" in chosen else []
        for overrides in further[: 1 + bool(chosen)]:
            mesh = next((mesh for mesh in MESHES if self._fits(overrides, mesh, size)), None)
            if mesh is not None:
                ranks = f"--mesh {mesh} {_options(chosen) if overrides else ''}".strip()
                lines.append(f"{'or' if fitting else 'it fits'} on several devices with {ranks}")
                break
        if not fitting:
            lines.insert(0, "no knob of the recipe makes it fit" + (" on one device" if plan.mesh is None else ""))
        return lines

    def _on_one(self, plan: Plan, size: float) -> tuple[dict[str, Knob], bool]:
        """Return the knobs that lower the peak, as few as make it fit on this mesh, and whether they do."""
        mesh = None if plan.mesh is None else f"fsdp={plan.mesh.fsdp},ep={plan.mesh.ep}"
        turned = [*knobs(self.recipe, plan.layers, size, apart=is_apart(torch.device(plan.device)))]
        chosen = self._at_rest(turned, mesh, size)
        if not self._may_fit([*_texts(chosen)], mesh, size):
            return chosen, False
        made = self.plan([*_texts(chosen)], mesh) if chosen else plan
        ladders = [[*rungs] for _, rungs in groupby(turned, key=lambda knob: knob.name)]
        if made.fits_on(size):
            return self._eased(chosen, "", ladders, mesh, size), True
        for ladder in ladders:
            if ladder[0].name == "mask" and not made.masking(size):
                continue
            for knob in self._rungs(ladder, chosen, mesh, size):
                tried = chosen | {knob.name: knob}
                if not self._may_fit([*_texts(tried)], mesh, size):
                    continue
                try:
                    lower = self.plan([*_texts(tried)], mesh)
                except ValueError:
                    continue  # the recipe or the mesh refuses it
                if sum(lower.on(size).values()) < sum(made.on(size).values()):
                    chosen, made = tried, lower
                if made.fits_on(size):
                    return self._eased(chosen, knob.name, ladders, mesh, size), True
        return chosen, False

    def _rungs(self, ladder: list[Knob], chosen: dict[str, Knob], mesh: str | None, size: float) -> list[Knob]:
        """Return those of the knobs with one name that are worth a plan: the last one, and all where that suffices."""
        last = ladder[-1]
        if last.name == "scope" or self._fits([*_texts(chosen | {last.name: last})], mesh, size):
            return ladder
        return [last]

    def _eased(
        self, chosen: dict[str, Knob], needed: str, ladders: list[list[Knob]], mesh: str | None, size: float
    ) -> dict[str, Knob]:
        """Return what still fits without knobs, or with others of their name that change less, in the order of knobs.

        The knob of the name `needed` stays.
        """
        for name in [name for name in reversed(chosen) if name != needed]:
            ladder = next(ladder for ladder in ladders if ladder[0].name == name)
            fewer = {other: knob for other, knob in chosen.items() if other != name}
            less = [fewer, *(chosen | {name: knob} for knob in ladder[: ladder.index(chosen[name])])]
            chosen = next((tried for tried in less if self._fits([*_texts(tried)], mesh, size)), chosen)
        return {ladder[0].name: chosen[ladder[0].name] for ladder in ladders if ladder[0].name in chosen}

    def _at_rest(self, turned: list[Knob], mesh: str | None, size: float) -> dict[str, Knob]:
        """Return the first knobs that lower what a step ends with, until that fits; with all of them it may still not.

        The others matter only then, so that none of them is planned before.
        """
        chosen: dict[str, Knob] = {}
        for knob in turned:
            if self._may_fit([*_texts(chosen)], mesh, size):
                break
            tried = chosen | {knob.name: knob}
            with suppress(ValueError):
                if self._at_least((*_texts(tried),), mesh) < self._at_least((*_texts(chosen),), mesh):
                    chosen = tried
        return chosen

    def _may_fit(self, overrides: list[str], mesh: str | None, size: float) -> bool:
        """Return whether a device is not too small for what every step ends with."""
        try:
            return self._at_least(tuple(overrides), mesh) <= size * 2**30
        except ValueError:
            return False

    def _fits(self, overrides: list[str], mesh: str | None, size: float) -> bool:
        try:
            return self._may_fit(overrides, mesh, size) and self.plan(overrides, mesh).fits_on(size)
        except ValueError:
            return False


def _texts(chosen: dict[str, Knob]) -> Iterator[str]:
    for knob in chosen.values():
        yield from knob.overrides


def _options(chosen: dict[str, Knob]) -> str:
    """Return the options of the command line that turn the knobs."""
    return f"--set {' '.join(map(shlex.quote, _texts(chosen)))}"
