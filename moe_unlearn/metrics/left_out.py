"""Leave out the rows of a set that cannot be measured, so that they cost the other rows nothing.

A row that lacks a field is an error before any work. A row that is well formed may still be one that this model or
this tokenizer cannot take: its prompt is too long, or its text spells a special token. Such a row is in no number of
its set. Results name it in `left_out`, and `results.Evaluation` reports it on stderr.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from moe_unlearn.data import DocumentError, Example
from moe_unlearn.metrics.results import Result, by_index
from moe_unlearn.ops.token_loss import IGNORED


@dataclass(frozen=True)
class Kept:
    """Holds what was made of the rows of set `name`, by row from 0, and why the other rows are left out.

    Raises ValueError, with the reason of the first row, if no row is left.
    """

    name: str
    made: dict[int, object]
    left_out: dict[int, str]

    def __post_init__(self) -> None:
        if not self.made and not self.left_out:
            raise ValueError(f"{self.name}: expected at least one row; got none")
        if not self.made:
            first = min(self.left_out)
            rest = f"; none of its {len(self.left_out)} rows can be measured" if len(self.left_out) > 1 else ""
            raise ValueError(f"{self.name}, row {first}: {self.left_out[first]}{rest}")

    @property
    def values(self) -> list:
        """Return what was made, in the order of the rows."""
        return list(self.made.values())

    @property
    def records(self) -> list[dict]:
        """Return a record of each row that is left out, as results have them: `set`, `row`, `reason`."""
        return [{"set": self.name, "row": row, "reason": reason} for row, reason in sorted(self.left_out.items())]

    def of(self, rows: Sequence) -> list:
        """Return those of the rows that are kept."""
        return [rows[number] for number in self.made]

    def then(self, make: Callable) -> "Kept":
        """Return what `make` makes of each value; a row for which it raises DocumentError is left out too."""
        return _kept(self.name, self.made.items(), make, self.left_out)

    def placed(self, result: Result) -> Result:
        """Return the result with its values under their rows, where those left out have None, and with `left_out`."""
        if not self.left_out:
            return result
        values = list(result["value_by_index"].values())
        rows = dict.fromkeys(sorted([*self.made, *self.left_out]), dict.fromkeys(values[0]))
        rows |= dict(zip(self.made, values, strict=True))
        return result | {"value_by_index": by_index(list(rows.values()))} | marks(self)


def keep(name: str, rows: Iterable, make: Callable) -> Kept:
    """Return what `make` makes of each row; a row for which it raises DocumentError is left out."""
    return _kept(name, enumerate(rows), make, {})


def marks(*sets: Kept) -> dict[str, list[dict]]:
    """Return what says in a result which rows of these sets are left out: nothing if none is."""
    records = [record for kept in sets for record in kept.records]
    return {"left_out": records} if records else {}


def measured(result: Result) -> list[dict]:
    """Return the values of the rows of a result that are not left out."""
    absent = {str(record["row"]) for record in result.get("left_out", ())}
    return [value for row, value in result["value_by_index"].items() if row not in absent]


def labelled(example: Example) -> Example:
    """Return the example; raise DocumentError if no token that a model predicts carries a label."""
    if all(label == IGNORED for label in example.labels[1:]):
        raise DocumentError("expected at least one token with a label; got none")
    return example


def _kept(name: str, rows: Iterable[tuple[int, object]], make: Callable, left_out: dict[int, str]) -> Kept:
    made, left_out = {}, dict(left_out)
    for number, row in rows:
        try:
            made[number] = make(row)
        except DocumentError as error:
            left_out[number] = error.reason
    return Kept(name, made, left_out)
