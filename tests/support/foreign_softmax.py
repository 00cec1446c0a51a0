"""The foreign kernel of the README of moe_unlearn.regress: as it stands, and what breaks it."""

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "moe_unlearn" / "regress" / "README.md"
RIGHT, REORDERED = "e / e.sum(-1, keepdim=True)", "e / e.flip(-1).cumsum(-1)[:, -1:]"
BROKEN = "e / e[:, :-1].sum(-1, keepdim=True)"


def example() -> str:
    """The foreign softmax of the README of this package."""
    (found,) = re.findall(r"```python\n(import pytest.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert RIGHT in found and len([line for line in found.splitlines() if line.strip()]) <= 20
    return found
