"""The table a benchmark makes: runs by metrics, for every seed."""

import json
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from moe_unlearn.metrics import privleak
from moe_unlearn.runs.summary import COLUMNS, Summary, summarise, table

RETRAIN = "retrain"  # the run PrivLeak is relative to


@dataclass(frozen=True)
class Table:
    """What was measured: seed -> run -> metric -> value. A metric may be absent where it has no meaning."""

    results: dict[int, dict[str, dict[str, float]]]

    @property
    def seeds(self) -> list[int]:
        """In the order they were given."""
        return list(self.results)

    @property
    def runs(self) -> list[str]:
        """The rows, in order."""
        return list(dict.fromkeys(run for rows in self.results.values() for run in rows))

    @property
    def metrics(self) -> list[str]:
        """The columns: those a report knows in its order, then the others as they came."""
        found = dict.fromkeys(key for rows in self.results.values() for values in rows.values() for key in values)
        return [key for key in COLUMNS if key in found] + [key for key in found if key not in COLUMNS]

    def __iter__(self) -> Iterator[dict]:
        """One dict for each seed and run: {"run": ..., "seed": ..., metric: value ...}."""
        for seed, rows in self.results.items():
            for run, values in rows.items():
                yield {"run": run, "seed": seed, **values}

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.results.values())

    def summary(self) -> Summary:
        """Run -> metric -> mean over seeds and, with two or more, `<metric>_sd`, the sample standard deviation."""
        return summarise(self.results)

    def to_markdown(self, metrics: Sequence[str] | None = None) -> str:
        """A row for each run, mean ± standard deviation over seeds; by default all columns."""
        unknown = sorted(set(metrics or ()) - set(self.metrics))
        if unknown:
            raise ValueError(f"expected metrics among {', '.join(self.metrics)}; got {', '.join(unknown)}")
        return table(self.summary(), markdown=True, keys=self.metrics if metrics is None else metrics)

    def to_json(self) -> str:
        """Everything; `from_json` of it is an equal table. NaN is written as JavaScript does."""
        return json.dumps({"results": self.results}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Table":
        """ValueError for what `to_json` did not write."""
        try:
            results = {int(seed): rows for seed, rows in json.loads(text)["results"].items()}
            for rows in results.values():
                for run, values in rows.items():
                    checked(values, f"run {run!r}")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"expected the JSON of a Table; {error!r}") from error
        return cls(results)

    @classmethod
    def joined(cls, tables: Iterable["Table"]) -> "Table":
        """The rows of all `tables`, PrivLeak computed wherever the retrained model is now beside a run.

        Raises ValueError for a row that two of them have.
        """
        results: dict[int, dict[str, dict[str, float]]] = {}
        for other in tables:
            for seed, rows in other.results.items():
                if both := results.setdefault(seed, {}).keys() & rows.keys():
                    raise ValueError(f"two tables have run {sorted(both)[0]!r} of seed {seed}")
                results[seed] |= {run: dict(values) for run, values in rows.items()}
        for rows in results.values():
            reference = rows.get(RETRAIN, {}).get("minkauc")
            for values in rows.values():
                if reference is not None and "minkauc" in values:
                    values["privleak"] = privleak(values["minkauc"], reference)
        return cls(results)


def checked(values: object, what: str) -> dict[str, float]:
    """`values` as plain floats; ValueError, naming `what` gave them, for anything but a dict of numbers."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{what}: expected a dict of numbers; got {type(values).__name__}")
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, numbers.Real):
            raise ValueError(f"{what}: expected a dict of name -> number; got {name!r}: {value!r}")
    return {name: float(value) for name, value in values.items()}
