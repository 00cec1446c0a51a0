"""The tables of moe_unlearn/recipes/README.md: every shipped recipe and every key, made from what is there.

    python -m tests.recipe_page          writes the page

A recipe is described by the comment at the head of its file; the keys are those of `moe_unlearn.config.keys`.
"""

import sys
from pathlib import Path

from moe_unlearn.config import keys, shipped
from moe_unlearn.config.files import description

PAGE = Path(__file__).resolve().parent.parent / "moe_unlearn" / "recipes" / "README.md"
_HEADER = "| key | type | values | default | meaning |\n|---|---|---|---|---|"


def recipes() -> str:
    """Return the table of the shipped recipes."""
    return "\n".join(
        ["| recipe | what it is |\n|---|---|", *(f"| `{name}` | {description(name)} |" for name in shipped())]
    )


def table() -> str:
    """Return the table of all keys."""
    lines = [_HEADER]
    for key in keys.table():
        cells = f"`{key.name}`", key.kind, key.values, f"`{keys.shown(key.default)}`", key.meaning
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def current(page: str) -> str:
    """Return the page with both tables as they are now. Raises ValueError unless all marks are there."""
    for name, made in {"recipes": recipes(), "recipe-keys": table()}.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, begins, rest = page.partition(begin)
        _, ends, after = rest.partition(end)
        if not begins or not ends:
            raise ValueError(f"expected {begin} and then {end} in {PAGE.name}")
        page = f"{before}{begin}\n{made}\n{end}{after}"
    return page


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(current(page), encoding="utf-8")
    print(f"{PAGE.name} {'says so already' if current(page) == page else 'written'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
