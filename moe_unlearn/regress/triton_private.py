"""Hold all uses of Triton's private interface (3.6 to 3.9) by the ahead-of-time tool: record launches, compile them.

Triton's own `JITFunction.run` binds and specialises the arguments of a launch. A driver that only knows its target
stands in for the GPU, and what would be compiled and run is kept instead.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moe_unlearn.regress.static_case import LaunchCase, TritonCase

VERSION = f"triton {triton.__version__}"


class Launch(NamedTuple):
    """One specialisation of a kernel, with everything its compilation depends on."""

    kernel: JITFunction
    arch: int
    signature: dict[str, Any]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """Return the kernel's file and function, such as "route/_count_kernel"."""
        return f"{Path(self.kernel.fn.__code__.co_filename).stem}/{self.kernel.fn.__name__}"

    @property
    def identity(self) -> str:
        """Return a digest of what determines the binary.

        It is equal for two launches that one version of Triton compiles to the same binary, on whatever machine. The
        kernel's cache key covers its source, every function it calls and the constants they read.
        """
        constexprs = {path: getattr(value, "cache_key", value) for path, value in self.constexprs.items()}
        # the paths of Triton's own libraries belong to its version, not to the launch
        options = sorted((name, value) for name, value in self.options.items() if name != "extern_libs")
        parts = self.arch, self.kernel.cache_key, self.signature, constexprs, self.attrs, options
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    @property
    def config(self) -> str:
        """Return in readable form what distinguishes it from other launches of the kernel."""
        names = list(self.signature)
        constants = {names[path[0]]: value for path, value in self.constexprs.items() if len(path) == 1}
        types = dict.fromkeys(str(t).removeprefix("*") for t in self.signature.values() if str(t).startswith("*"))
        shown = [f"{name}={value}" for name, value in constants.items()]
        shown += [f"{name}={self.options[name]}" for name in ("num_warps", "num_stages")]
        shown += ["enable_fp_fusion=False"] * (not self.options["enable_fp_fusion"])
        return " ".join([",".join(types), *shown])


class Binary(NamedTuple):
    cubin: bytes
    ttir: str
    shared_bytes: int
    tensor_memory_columns: int


class _Target:
    """Driver of a GPU that is not there; the device number is the architecture, which keeps Triton's caches apart."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def launches(case: TritonCase | LaunchCase, arch: int) -> list[Launch]:
    """Return what `case` compiles, in order, each specialisation once; no kernel runs.

    Raises ValueError if it compiles nothing.
    """
    found = recorded(case.launch, arch) if isinstance(case, LaunchCase) else [_specialised(case, arch)]
    if not found:
        raise ValueError(f"the static case {case.name!r} launches no kernel on sm_{arch}")
    return found


def recorded(launches: Callable[[], object], arch: int) -> list[Launch]:
    """Return what `launches()` launches, in order, each specialisation once; no kernel runs."""
    found: dict[str, Launch] = {}

    def keep(
        kernel: Any, key: Any, signature: Any, device: Any, constexprs: Any, options: Any, attrs: Any, warmup: Any
    ) -> None:
        launch = Launch(kernel, arch, signature, constexprs, attrs, dict(options.__dict__))
        found.setdefault(launch.identity, launch)

    original, JITFunction._do_compile = JITFunction._do_compile, keep
    before, driver._active = driver._active, _Target(arch)
    try:
        launches()
    finally:
        JITFunction._do_compile, driver._active = original, before
    return list(found.values())


class Stub(NamedTuple):
    """One launch that ended where the device would begin: the kernel, what it was compiled for, and its grid."""

    kernel: str
    key: str
    grid: tuple[int, ...]


@contextlib.contextmanager
def stubbed(arch: int) -> Iterator[list[Stub]]:
    """Run Triton's own code for each launch inside, but nothing on a device; list the launches in their order."""
    launches: list[Stub] = []
    touched: list[JITFunction] = []

    def keep(
        kernel: Any, key: Any, signature: Any, device: Any, constexprs: Any, options: Any, attrs: Any, warmup: Any
    ) -> Any:
        name = kernel.fn.__name__

        def run(*given: Any) -> None:
            launches.append(Stub(name, str(key), given[:3]))

        made = SimpleNamespace(run=run, function=0, packed_metadata=(), launch_metadata=lambda *_: None)
        touched.append(kernel)
        kernel.device_caches[device][0][key] = made
        return made

    original, JITFunction._do_compile = JITFunction._do_compile, keep
    before, driver._active = driver._active, _Target(arch)
    try:
        yield launches
    finally:
        JITFunction._do_compile, driver._active = original, before
        for kernel in touched:
            kernel.device_caches.pop(arch, None)


def _specialised(case: TritonCase, arch: int) -> Launch:
    """Return the launch of a case, reading its signature as Triton's own ahead-of-time compiler does."""
    kernel = case.kernel
    while not isinstance(kernel, JITFunction):
        if not hasattr(kernel, "fn"):
            raise ValueError(f"the static case {case.name!r}: expected a @triton.jit kernel; got {case.kernel!r}")
        kernel = kernel.fn  # the kernel inside autotune and heuristics
    names, given = kernel.arg_names, {*case.signature, *case.constexprs}
    if given != set(names):
        raise ValueError(
            f"the static case {case.name!r}: {kernel.fn.__name__} takes {', '.join(names)}; missing "
            f"{sorted(set(names) - given)}, unknown {sorted(given - set(names))}"
        )
    kinds = {name: case.signature.get(name, "constexpr") for name in names}
    signature = {name: kind.removesuffix(":16") for name, kind in kinds.items()}
    constexprs: dict[tuple[int, ...], Any] = {(names.index(name),): value for name, value in case.constexprs.items()}
    attrs: dict[tuple[int, ...], Any] = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds.values()) if kind.endswith(":16")
    }
    wanted = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    options = make_backend(GPUTarget("cuda", arch, 32)).parse_options(wanted)
    return Launch(kernel, arch, signature, constexprs, attrs, dict(options.__dict__))


def compile_launch(launch: Launch) -> Binary:
    compiled = _compiled(launch)
    metadata = compiled.metadata
    return Binary(compiled.asm["cubin"], compiled.asm["ttir"], metadata.shared, getattr(metadata, "tmem_size", 0) or 0)


def into_cache(launch: Launch) -> bool:
    """Compile a launch into Triton's cache as the launch itself would, and return whether it was there already."""
    hits: list[bool] = []
    before = knobs.compilation.listener
    knobs.compilation.listener = lambda *, cache_hit, **known: hits.append(cache_hit)
    try:
        _compiled(launch)
    finally:
        knobs.compilation.listener = before
    return hits == [True]


def settle(cache: Path) -> int:
    """Write into a cache that was moved where its files lie now, and return how many kernels that concerned.

    Triton keeps absolute paths in the file of each kernel's group, and compiles anew what is not there.
    """
    moved = 0
    for group in sorted(cache.glob("*/__grp__*.json")):
        told = json.loads(group.read_text(encoding="utf-8"))["child_paths"]
        here = {name: str(group.parent / name) for name in told}
        if told != here and all(map(os.path.exists, here.values())):
            new = group.with_name(f"{group.name}.new")
            new.write_text(json.dumps({"child_paths": here}), encoding="utf-8")
            new.replace(group)
            moved += 1
    return moved


def _compiled(launch: Launch) -> Any:
    source = ASTSource(launch.kernel, launch.signature, launch.constexprs, launch.attrs)
    return triton.compile(source, target=GPUTarget("cuda", launch.arch, 32), options=launch.options)
