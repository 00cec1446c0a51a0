"""Loads the package's public names when they are asked for, and registers its experts when transformers has any.

`import moe_unlearn` alone takes a moment, so that the command line can answer --help without torch. A name in
`moe_unlearn.__all__` is imported at its first use, by an attribute or by `from moe_unlearn import NAME`. That
`experts_implementation="moe_unlearn"` works after the import, whichever of the two packages came first, takes a hook:
when transformers' own modules of experts have been executed, a function that imports `moe_unlearn.experts` at its first
call is registered with them.
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

EXPERTS = "moe_unlearn"  # the name of the experts implementation
# transformers' modules with an interface of experts, the interface, and our function for it in `moe_unlearn.experts`
_INTERFACES = {
    "transformers.integrations.moe": ("ExpertsInterface", "experts_forward"),
    "transformers.integrations.finegrained_fp8": ("FP8ExpertsInterface", "fp8_experts_forward"),
}


class Package(ModuleType):
    """A package whose public names are loaded when they are asked for.

    `homes` says in which module each name stands; a name that stands in itself is that module. A function that has the
    name of its module stays the package's attribute after the module is imported, which would set itself there.
    """

    homes: Mapping[str, str]

    def __getattr__(self, name: str) -> Any:
        home = self.homes.get(name)
        if home is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        module = importlib.import_module(f"{self.__name__}.{home}")
        value = module if name == home else getattr(module, name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        module = isinstance(value, ModuleType)
        if not (module and self.__dict__.get("homes", {}).get(name, name) != name):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.homes})


def install(name: str, homes: Mapping[str, str]) -> None:
    """Make the module `name` a `Package` with these homes, and register the experts when transformers has any."""
    module = sys.modules[name]
    module.__dict__["homes"] = homes
    module.__class__ = Package
    missing = [each for each in _INTERFACES if each not in sys.modules]
    for each in _INTERFACES.keys() - missing:
        _register(sys.modules[each])
    if missing:
        sys.meta_path.insert(0, _Watch(missing))


class _Watch:
    """Finds transformers' modules of experts as Python does, and registers ours once one has been executed."""

    def __init__(self, names: Sequence[str]):
        self._awaited = {*names}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a module that is waited for; None for all others."""
        if name not in self._awaited:
            return None
        self._awaited.remove(name)
        spec = PathFinder.find_spec(name, path, target)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            loader.exec_module = execute_and_register
        return spec


def _register(module: ModuleType) -> None:
    """Register a function with a module's interface of experts that loads ours when it is called."""
    interface, function = _INTERFACES[module.__name__]
    getattr(module, interface).register(EXPERTS, _loading(function))


def _loading(function: str) -> Callable[..., Any]:
    def forward(*given: Any, **more: Any) -> Any:
        return getattr(importlib.import_module("moe_unlearn.experts"), function)(*given, **more)

    return forward
