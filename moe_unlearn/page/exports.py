"""A table for other programs: LaTeX, with the rules of booktabs, and comma-separated values."""

import csv
import io
from collections.abc import Sequence

from moe_unlearn.page.blocks import numeric
from moe_unlearn.page.text import clean

_LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"},  # other signs in TeX's first fonts
    **{"±": r"$\pm$", "–": "--", "↓": r"$\downarrow$", "↑": r"$\uparrow$", "→": r"$\to$", "λ": r"$\lambda$"},
    **{"[": "{[}", "]": "{]}"},  # after \\ a bracket would begin its argument
}


def latex(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a tabular, numbers to the right; it needs \\usepackage{booktabs}."""
    kinds = "".join("r" if right else "l" for right in numeric(rows, len(head)))
    lines = [" & ".join(map(_escaped, row)) + r" \\" for row in (head, *rows)]
    return (
        "\n".join(
            [
                rf"\begin{{tabular}}{{{kinds}}}",
                r"\toprule",
                lines[0],
                r"\midrule",
                *lines[1:],
                r"\bottomrule",
                r"\end{tabular}",
            ]
        )
        + "\n"
    )


def comma_separated(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return lines of values as they are, quoted where they need it; no name is taken for a formula."""
    made = io.StringIO()
    writer = csv.writer(made, lineterminator="\n")
    for row in (head, *rows):
        writer.writerow([_unformed(value) if isinstance(value, str) else value for value in row])
    return made.getvalue()


def _escaped(cell: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(clean(cell).split()))


def _unformed(value: str) -> str:
    return f"'{clean(value)}" if value[:1] in "=+-@\t\r" and value else clean(value)
