"""Define a case: one kernel, its reference, and inputs that a seed determines.

Cases are registered by the modules that hold them. Ours are in `ours`; a user's are in a file given by
`--module path` (`load`) or in a package that names itself under the entry point group `moe_unlearn.kernels`
(`load_entry_points`; the entry point is a module that registers when imported). A store never names code to
import.
"""

import contextvars
import dataclasses
import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

GROUP = "moe_unlearn.kernels"

_registry: dict[str, "Case"] = {}
_origin: contextvars.ContextVar[str] = contextvars.ContextVar("origin", default="")


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel under test.

    function: function(**inputs) -> a tensor, or a tuple, list or dict of tensors. It must not change its inputs.
    reference: the same call in plain PyTorch. On float64 copies of the floating inputs it gives the truth, on the
        inputs themselves the baseline, unless `baseline` is given (a kernel that is meant to be less accurate than
        plain PyTorch in its dtype, say in fp8, names its own).
    inputs: inputs(seed, **sizes) -> the arguments by name: tensors, lists of tensors, plain values; with `routing` set
        it is called with routing=... too. All randomness comes from the seed.
    sizes: sizes that a shrinker may reduce, down to `smallest` (1 for sizes it does not name).
    routing: a pattern of `testing.ROUTINGS`, or "" for none.
    gradients: the inputs whose gradients are compared too.
    device: where the inputs are moved before the calls; None leaves them.
    origin: path of the file, or name of the module or entry point it came with; `register` sets it.
    """

    name: str
    function: Callable
    reference: Callable
    inputs: Callable
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    tags: frozenset[str] = frozenset()
    smallest: Mapping[str, int] = dataclasses.field(default_factory=dict)
    routing: str = ""
    gradients: tuple[str, ...] = ()
    baseline: Callable | None = None
    device: str | None = None
    origin: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or not self.name.isprintable():
            raise ValueError(f"a case's name must be printable text; got {self.name!r}")
        for field in ("function", "reference", "inputs"):
            if not callable(getattr(self, field)):
                raise TypeError(f"case {self.name!r}: {field} must be callable; got {getattr(self, field)!r}")
        names: tuple[object, ...] = self.tags, self.gradients
        if any(isinstance(value, str) for value in names):
            raise TypeError(f"case {self.name!r}: tags and gradients are collections of names, not one string")
        bad = {k: v for k, v in self.sizes.items() if not isinstance(v, int) or v < self.smallest.get(k, 1)}
        if bad:
            raise ValueError(f"case {self.name!r}: sizes must be integers of at least their smallest; got {bad}")

    def make(self, seed: int = 0, *, routing: str | None = None, **sizes: int) -> dict[str, object]:
        """Return the inputs at `seed`, with some sizes or the routing changed, on the case's device."""
        chosen = {"routing": routing or self.routing} if self.routing else {}
        made = self.inputs(seed, **{**self.sizes, **sizes}, **chosen)
        if not isinstance(made, Mapping):
            raise TypeError(f"case {self.name!r}: inputs must give a dict; got {type(made).__name__}")
        return {k: v if self.device is None else _to(v, self.device) for k, v in made.items()}


def register(case: Case) -> Case:
    """Register `case` under its name and return it; raise ValueError if another file registered the name."""
    origin = _origin.get() or case.origin or getattr(case.inputs, "__module__", "")
    known = _registry.get(case.name)
    if known is not None and known.origin != origin:
        raise ValueError(f"two cases are named {case.name!r}: from {known.origin} and from {origin}")
    _registry[case.name] = dataclasses.replace(case, origin=origin)
    return _registry[case.name]


def cases(patterns: Iterable[str] = (), *, tags: Iterable[str] = ()) -> list[Case]:
    """Return, by name, the cases that match one of `patterns` (shell style; none matches all) and have all `tags`."""
    patterns, wanted = tuple(patterns), frozenset(tags)
    return [
        case
        for name, case in sorted(_registry.items())
        if wanted <= case.tags and (not patterns or matches(name, patterns))
    ]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a name matches one of the shell-style patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def on(case: Case, device: str | None) -> Case:
    """Return the case with its inputs moved to `device`; None leaves it."""
    return case if device is None else dataclasses.replace(case, device=device)


def forget(origin: str) -> None:
    """Unregister the cases that came from `origin`."""
    for name in [name for name, case in _registry.items() if case.origin == origin]:
        del _registry[name]


def load(path: str | Path) -> list[Case]:
    """Run the Python file at `path`, register its cases and return them; those of an earlier load are replaced.

    Its cases are those it registers itself, and the `Case` objects and lists of them among its global names.
    """
    path = Path(path).resolve()
    origin = str(path)
    before = dict(_registry)
    forget(origin)
    token = _origin.set(origin)
    try:
        for value in list(vars(execute(path)).values()):
            for case in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(case, Case):
                    register(case)
    except BaseException:
        _registry.clear()
        _registry.update(before)
        raise
    finally:
        _origin.reset(token)
    found = [case for case in _registry.values() if case.origin == origin]
    if not found:
        _registry.update(before)
        raise ValueError(f"{path}: expected moe_unlearn.regress.case.Case objects among the global names; got none")
    return found


def execute(path: str | Path) -> ModuleType:
    """Run the Python file at `path`, as its text is now, and return the module.

    Raises ValueError for what is no file, and for a file that ends the program.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise ValueError(f"--module expects a Python file; got {str(path)!r}")
    name = f"_kernels_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    loader = _Fresh(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None  # a loader is given
    module = importlib.util.module_from_spec(spec)
    # registered by name, because a decorator or dataclass of the file may look up its own module
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))
    try:
        loader.exec_module(module)
    except SystemExit as ended:
        raise ValueError(
            f"{path}: expected a file that defines cases; it ended the program, with {ended.code}"
        ) from None
    finally:
        sys.path.remove(str(path.parent))
    return module


class _Fresh(importlib.machinery.SourceFileLoader):
    """Loader that reads the text as it is now."""

    def path_stats(self, path: str) -> dict:
        # without a modification time no cached .pyc is used, which may be outdated within the clock's resolution
        raise OSError("not cached")


def load_entry_points() -> None:
    """Import the modules that installed packages offer under the group `moe_unlearn.kernels`."""
    for point in importlib.metadata.entry_points(group=GROUP):
        token = _origin.set(point.value)
        try:
            point.load()
        finally:
            _origin.reset(token)


def digests(inputs: Mapping[str, object]) -> dict[str, str]:
    """Return the SHA-256 of each input: of dtype, shape and values of a tensor, of the text of a plain value."""
    return {name: digest(value, name) for name, value in inputs.items()}


def digest(value: object, name: str = "value") -> str:
    """Return the SHA-256 of a tensor (dtype, shape, bytes) or of nested lists of tensors and plain values."""
    hasher = hashlib.sha256()
    for part in _parts(value, name):
        hasher.update(part)
    return hasher.hexdigest()


def _parts(value: Any, name: str) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        yield f"tensor {value.dtype} {tuple(value.shape)};".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, (list, tuple)):
        yield f"{type(value).__name__} {len(value)};".encode()
        for item in value:
            yield from _parts(item, name)
    elif isinstance(value, dict):
        yield f"dict {len(value)};".encode()
        for key, item in value.items():
            yield f"{key!r}:".encode()
            yield from _parts(item, name)
    elif value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        yield f"{value!r};".encode()
    else:
        raise TypeError(
            f"input {name!r}: expected tensors, lists or dicts of them, or plain values; got {type(value).__name__}"
        )


def source(case: Case) -> dict[str, object]:
    """Return the kernel's origin: function, SHA-256 of its file, git commit and whether its tree was changed."""
    function: Any = case.function
    while hasattr(function, "func") or hasattr(function, "__wrapped__"):
        function = getattr(function, "func", None) or function.__wrapped__
    found: dict[str, object] = {"function": getattr(function, "__qualname__", type(function).__name__)}
    try:
        file: Any = inspect.getsourcefile(function)  # None, a TypeError to Path, where there is none
        path = Path(file)
        found |= {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    except (TypeError, OSError):  # builtins and C functions have no file
        return found
    commit = _git(path.parent, "rev-parse", "HEAD")
    if commit is not None:
        changed = _git(path.parent, "status", "--porcelain", "--untracked-files=no")
        found |= {"commit": commit, "dirty": bool(changed)}
    return found


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _to(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_to(item, device) for item in value)
    return value
