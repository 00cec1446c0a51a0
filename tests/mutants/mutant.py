"""A mutant: one small edit of a source file, drawn by a seed and judged by the tests of what the file belongs to."""

import random
from collections.abc import Hashable
from pathlib import Path
from typing import NamedTuple, Protocol

ROOT = Path(__file__).resolve().parents[2]


class Mutant(NamedTuple):
    """One edit: the characters [start, stop) of a file become `text`."""

    file: str
    kernel: str
    kind: str
    start: int
    stop: int
    text: str
    line: int

    def apply(self, source: str) -> str:
        return source[: self.start] + self.text + source[self.stop :]

    def diff(self, source: str) -> tuple[str, str]:
        """The changed lines before and after, without indentation; what identifies the mutant."""
        first = source.rfind("\n", 0, self.start) + 1
        last = source.find("\n", self.stop)
        changed = source[first : self.start] + self.text + source[self.stop : last]
        return tuple(" ".join(text.split()) for text in (source[first:last], changed))


class Stage(Protocol, Hashable):
    """Tests that are run together."""

    arguments: tuple[str, ...]  # pytest's


class DoesNotBuild(Exception):
    """No compiler accepts the mutant: it says nothing about the tests."""


class Family(Protocol):
    """The kernels of one language: the modules `triton`, `native` and `cuda` of `tests.mutants` have this shape."""

    def files(self) -> list[Path]:
        """Return the files that are mutated."""

    def path_of(self, file: str) -> Path:
        """Return where the file of a mutant lies."""

    def mutants_of(self, path: Path) -> list[Mutant]:
        """Return every mutant of a file, in the order of its text."""

    def drawn(self, seed: int = 0) -> list[Mutant]:
        """Return the mutants that are run."""

    def stages(self, file: str) -> list[Stage]:
        """Return the tests of a file, the fastest and likeliest to fail first."""

    def prepare(self) -> None:
        """Do once what every run needs: the slow imports."""

    def copy(self, folder: Path, mutant: Mutant | None) -> None:
        """Copy the kernels into the folder, with the edit."""

    def build(self, folder: Path, stage: Stage) -> bool:
        """Build in the folder what the stage tests, or raise DoesNotBuild; return False if it is the same code."""

    def enter(self, folder: Path, stage: Stage) -> None:
        """Have this process, which ends with the stage, use the kernels of the folder."""


def in_turn(mutants: list[Mutant], generator: random.Random, count: int) -> list[Mutant]:
    """Return `count` mutants, their kinds in turn as they first occur, each kind in an order drawn by the generator."""
    kinds: dict[str, list[Mutant]] = {}
    for mutant in mutants:
        kinds.setdefault(mutant.kind, []).append(mutant)
    for group in kinds.values():
        generator.shuffle(group)
    longest = max(map(len, kinds.values()), default=0)
    return [group[i] for i in range(longest) for group in kinds.values() if i < len(group)][:count]
