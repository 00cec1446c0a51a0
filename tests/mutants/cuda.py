"""Mutants of the CUDA kernels in emulated threads: edits of tokens in `csrc/cuda/`, and named breakages of Hopper's.

They are built and judged as `tests.mutants.native` says.
"""

from pathlib import Path

from tests.mutants import cplusplus, native
from tests.mutants.breakages import BREAKAGES
from tests.mutants.mutant import Mutant
from tests.mutants.native import build, copy, enter, mutants_of, path_of, stages
from tests.mutants.native import import_tests as prepare

__all__ = ["breakages", "build", "copy", "drawn", "enter", "files", "mutants_of", "path_of", "prepare", "stages"]

PER_FILE = 2


def files() -> list[Path]:
    """Return the sources, none where nothing can compile them."""
    return native.sources(native.CSRC / "cuda") if native.has_nvcc() else []


def breakages() -> list[Mutant]:
    """Return the named breakages; ValueError for one whose text does not stand in its file exactly once."""
    found = []
    for path in files():
        source = path.read_text(encoding="utf-8")
        for kind, text, replacement in BREAKAGES.get(path.name, ()):
            if source.count(text) != 1:
                raise ValueError(f"{path.name}, {kind}: its text stands there {source.count(text)} times")
            start = source.index(text)
            function = next(token.function for token in cplusplus.tokens_of(source) if token.start >= start)
            line, file = source.count("\n", 0, start) + 1, str(path.relative_to(native.CSRC.parent))
            found.append(Mutant(file, function, kind, start, start + len(text), replacement, line))
    return found


def drawn(seed: int = 0) -> list[Mutant]:
    """Return PER_FILE mutants of each file, and every named breakage."""
    return native.drawn_of(files(), PER_FILE, seed) + breakages()
