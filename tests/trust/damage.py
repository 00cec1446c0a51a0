"""Damage to a file, and what a command makes of it: refused, made good, or silent."""

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

from moe_unlearn.cli.launch import REFUSED
from moe_unlearn.regress.report import CORRUPT
from tests.trust.faults import Attempt, attempt

FORMS = ("flipped bit", "cut", "zeroed", "longer", "empty", "gone")


def damage(path: Path, form: str, draw: random.Random) -> bool:
    """Damage a file as `form` says, at a place that is drawn; return whether it differs from what it was."""
    content = bytearray(path.read_bytes())
    former = bytes(content)
    at = draw.randrange(len(content)) if content else 0
    if form == "gone":
        path.unlink()
        return True
    if form == "flipped bit" and content:
        content[at] ^= 1 << draw.randrange(8)
    elif form == "cut":
        del content[at:]
    elif form == "zeroed":
        content[at : at + 64] = bytes(len(content[at : at + 64]))
    elif form == "longer":
        content += bytes([draw.randrange(256)])
    elif form == "empty":
        content.clear()
    path.write_bytes(content)
    return bytes(content) != former


def outcome(
    arguments: Sequence[str], folder: Path, given: Path, file: str, form: str, seed: str, results: dict[str, bytes]
) -> tuple[str, Attempt | None]:
    """Return what becomes of a command whose `file` is damaged in a copy of `given`, and how the command ended.

    "refused": with an exit code that says so; "harmless": it wrote the same `results` (path -> bytes); "silent": it
    wrote others and ended well; "crash": anything else; "same": the damage changed nothing.
    """
    shutil.copytree(given, folder)
    if not damage(folder / file, form, random.Random(seed)):
        return "same", None
    ended = attempt(arguments, folder)
    if ended.code == 0:
        alike = all((folder / name).is_file() and (folder / name).read_bytes() == results[name] for name in results)
        return ("harmless" if alike else "silent"), ended
    named = ended.code in (REFUSED, CORRUPT) and "Traceback" not in ended.said  # `kernels` prints a table instead
    return ("refused" if named else "crash"), ended
