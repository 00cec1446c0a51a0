"""Table, the result of a benchmark: metrics of runs, for every seed."""

import json
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from moe_unlearn.metrics.privacy import add_privleak
from moe_unlearn.runs.summary import COLUMNS, Summary, summarise, table

RETRAIN = "retrain"  # the run that PrivLeak is relative to


@dataclass(frozen=True)
class Table:
    """Measurements: seed -> run -> metric -> value. A metric may be absent where it has no meaning."""

    results: dict[int, dict[str, dict[str, float]]]

    @property
    def seeds(self) -> list[int]:
        """Return the seeds in the order in which they were given."""
        return list(self.results)

    @property
    def runs(self) -> list[str]:
        """Return the names of the rows, in order."""
        return list(dict.fromkeys(run for rows in self.results.values() for run in rows))

    @property
    def metrics(self) -> list[str]:
        """Return the names of the columns: those of a report in its order, then the others in order of appearance."""
        found = dict.fromkeys(key for rows in self.results.values() for values in rows.values() for key in values)
        return [key for key in COLUMNS if key in found] + [key for key in found if key not in COLUMNS]

    def __iter__(self) -> Iterator[dict]:
        """Yield a dict for each seed and run: {"run": ..., "seed": ..., metric: value ...}."""
        for seed, rows in self.results.items():
            for run, values in rows.items():
                yield {"run": run, "seed": seed, **values}

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.results.values())

    def summary(self) -> Summary:
        """Return run -> metric -> mean over seeds; with two or more also `<metric>_sd`, sample standard deviations."""
        return summarise(self.results)

    def to_markdown(self, metrics: Sequence[str] | None = None) -> str:
        """Format a row for each run, with mean ± standard deviation over seeds; `metrics` are all by default."""
        unknown = sorted(set(metrics or ()) - set(self.metrics))
        if unknown:
            raise ValueError(f"expected metrics among {', '.join(self.metrics)}; got {', '.join(unknown)}")
        return table(self.summary(), markdown=True, keys=self.metrics if metrics is None else metrics)

    def to_json(self) -> str:
        """Return the table as JSON, of which `from_json` makes an equal table. NaN is written as in JavaScript."""
        return json.dumps({"results": self.results}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Table":
        """Read a table from the JSON of `to_json`; raise ValueError for any other text."""
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
        """Join the rows of all `tables` and compute PrivLeak for runs of a seed that has the retrained model.

        Raises ValueError for a row that two tables have.
        """
        results: dict[int, dict[str, dict[str, float]]] = {}
        for other in tables:
            for seed, rows in other.results.items():
                if both := results.setdefault(seed, {}).keys() & rows.keys():
                    raise ValueError(f"two tables have run {sorted(both)[0]!r} of seed {seed}")
                results[seed] |= {run: dict(values) for run, values in rows.items()}
        for rows in results.values():
            add_privleak(rows.values(), rows.get(RETRAIN, {}))
        return cls(results)


def checked(values: object, what: str) -> dict[str, float]:
    """Return a dict of numbers as plain floats; raise ValueError, naming the origin `what`, for anything else."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{what}: expected a dict of numbers; got {type(values).__name__}")
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, numbers.Real):
            raise ValueError(f"{what}: expected a dict of name -> number; got {name!r}: {value!r}")
    return {name: float(value) for name, value in values.items()}
