"""Keep the results of one benchmark on one model: compute each once, cache it by content, and write it at once.

A result is a dictionary in open-unlearning's form: `agg_value`, the reported number, and usually `value_by_index`,
the values it is made of, one entry a row of the data. `left_out`, present only if it is not empty, lists the rows
that could not be measured, each with its `set`, `row` (from 0) and `reason`; their entries have None, and stderr
reports them. A run's folder has three files:

    NAME_EVAL.json      result name -> result (with the values of every row)
    NAME_SUMMARY.json   result name -> agg_value, flat
    NAME_SETTINGS.json  what the numbers depend on: settings, a digest of the data of each result, and the special
                        tokens that stand around texts and answers

The folder of an earlier run can be the `ReferenceRun` of a later one. It holds the retrained (retain-only) model's
scores, with which PrivLeak and forget quality compare.
"""

import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn.data import added
from moe_unlearn.data.stored import tokenizer_digest
from moe_unlearn.files import finite, read_sealed, write_sealed, write_text
from moe_unlearn.metrics.unicode_rouge import TOKENIZER
from moe_unlearn.prepare.reference import autocast_dtypes, model_digest
from moe_unlearn.ranks import gather, gathered, is_first, on_first, sharded

FORMAT = "moe-unlearn evaluation 2"  # to be raised when the same model, data and settings give other numbers
Result = dict[str, Any]
_PLACES = 3  # how many rows that are left out of a set stderr names


def mean_result(values: list[dict], key: str) -> Result:
    """Return the result whose `agg_value` is the mean of `key` over the rows.

    A list counts as its mean, and None is left out. Raises ValueError if nothing is left to average.
    """
    numbers = []
    for value in values:
        number = value[key]
        if isinstance(number, list):
            number = sum(number) / len(number)
        if number is not None:
            numbers.append(number)
    if not numbers:
        raise ValueError(f"expected at least one row with a value of {key!r}; got none of {len(values)}")
    return {"agg_value": sum(numbers) / len(numbers), "value_by_index": by_index(values)}


def by_index(values: list[dict]) -> dict[str, dict]:
    """Return the rows under their positions as text, as JSON has them."""
    return {str(i): value for i, value in enumerate(values)}


def data_digest(rows: object) -> str:
    """Return the SHA-256 of rows of plain values."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=vars).encode()).hexdigest()


class ReferenceRun:
    """Results in the folder of an earlier evaluation, NAME_EVAL.json, by this package or open-unlearning.

    `result(key, settings, digest)` returns one of them. It raises ValueError, saying what differs, if the run was
    written with other settings or other data than those given. open-unlearning writes no settings; then a warning says
    so, and only the number of rows is checked.
    """

    def __init__(self, folder: str | Path, name: str):
        self.folder, self.name = Path(folder), name
        results = self._read("EVAL")
        if results is None:
            raise ValueError(f"expected a folder with the {name}_EVAL.json of an earlier evaluation; got {folder}")
        self._results = results
        self._written = self._read("SETTINGS")
        if self._written is None:
            warnings.warn(
                f"{self.folder} has no {name}_SETTINGS.json: that its data and settings agree is not checked",
                stacklevel=2,
            )
        elif self._written.get("format") != FORMAT:
            raise ValueError(
                f"{self.folder}: expected an evaluation of format {FORMAT!r}; got {self._written.get('format')!r}"
            )

    def result(self, key: str, settings: dict, digest: str, rows: int | None = None) -> Result:
        """Return result `key` for this data (of `rows` rows) at these settings; raise ValueError as the class says."""
        found = self._results.get(key)
        if not isinstance(found, dict) or found.get("agg_value") is None:
            raise ValueError(f"the reference run {self.folder} has no result {key!r}")
        if self._written is not None:
            theirs = self._written["settings"]
            # compared as JSON, where a tuple and a list are one setting
            ours = json.loads(json.dumps(settings))
            different = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
            if different:
                what = ", ".join(f"{k} {theirs.get(k)!r} instead of {ours.get(k)!r}" for k in different)
                raise ValueError(f"the reference run {self.folder} was made with other settings: {what}")
            if self._written["data"].get(key) != digest:
                raise ValueError(f"the reference run {self.folder} computed {key!r} on other data")
        elif rows is not None and len(found.get("value_by_index", ())) not in (0, rows):
            count = len(found["value_by_index"])
            raise ValueError(f"the reference run {self.folder} has {count} rows in {key!r}; expected {rows}")
        return found

    def _read(self, suffix: str) -> dict | None:
        path = self.folder / f"{self.name}_{suffix}.json"
        try:
            content = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not readable JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path}: expected a JSON object; got a {type(content).__name__}")
        return content


class Evaluation:
    """Computes, caches and writes the results of one benchmark; see the module docstring.

    Args:
        name: first part of the files' names.
        settings: plain values on which numbers depend; they are written, are part of the cache's key, and are compared
            with a reference run's.
        out: folder of the files; None writes none.
        cache_dir: folder of results by content of model, tokenizer, data and settings, and by autocast's dtype; None
            keeps none. A model with sharded weights is not cached; a warning says so.
        reference_run: folder of the retrained model's evaluation.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        tokenizer: Tokenizer,
        settings: dict,
        *,
        out: str | Path | None = None,
        cache_dir: str | Path | None = None,
        reference_run: str | Path | None = None,
    ):
        self.name, self.settings = name, settings
        self.results: dict[str, Result] = {}
        self.reference = None if reference_run is None else ReferenceRun(reference_run, name)
        self._out = None if out is None else Path(out)
        self._special_tokens = added(tokenizer).describe(tokenizer)
        self._data: dict[str, str] = {}
        self._reported: set[tuple[str, int]] = set()
        self._cache = None
        if cache_dir is not None and sharded(model):
            warnings.warn("results of a model with sharded weights are not cached", stacklevel=3)
        elif cache_dir is not None:
            self._cache = Path(cache_dir)
            self._identity = [
                FORMAT,
                TOKENIZER,
                # read by the first rank alone, which has the files; all of them hash as long as it does
                gathered(lambda: model_digest(model) if is_first() else None, lambda digest: digest)[1][0],
                *autocast_dtypes(),
                tokenizer_digest(tokenizer),
                name,
                settings,
            ]

    def add(self, key: str, data: object, compute: Callable[[], Result], *, digest: str | None = None) -> Result:
        """Add, write and return result `key`, a function of the model, `data` (plain rows) and the settings."""
        self._data[key] = digest = digest or data_digest(data)
        path = self._path(key, digest)
        result = self._cached(path)
        if result is None:
            result = compute()
            if path is not None:
                on_first(lambda: write_sealed(path, json.dumps(result).encode()))
        self.results[key] = result
        self._report(result.get("left_out", ()))
        out = self._out
        if out is not None:
            on_first(lambda: self._write(out))
        return result

    def digest(self, key: str) -> str:
        """Return the digest of the data of an added result."""
        return self._data[key]

    def from_reference(self, key: str) -> Result | None:
        """Return the reference run's result `key`, checked against this run's, or None without a reference run."""
        if self.reference is None:
            return None
        rows = len(self.results[key].get("value_by_index", ()))
        return self.reference.result(key, self.settings, self._data[key], rows)

    @property
    def summary(self) -> dict[str, float | None]:
        """Return result name -> number, sorted; None where it is not a number."""
        return {key: finite(result["agg_value"]) for key, result in sorted(self.results.items())}

    def _report(self, left_out: Sequence[dict]) -> None:
        """Print on stderr the rows that a result leaves out, except those of which an earlier one said so."""
        new = [record for record in left_out if (record["set"], record["row"]) not in self._reported]
        self._reported |= {(record["set"], record["row"]) for record in new}
        report_left_out(new)

    def _cached(self, path: Path | None) -> Result | None:
        found = None
        # only one rank looks, so that either all have the result or all compute it together
        if path is not None and is_first() and path.is_file():
            try:
                found = json.loads(read_sealed(path))
            except (OSError, ValueError) as error:
                warnings.warn(f"{path} is damaged ({error}); it is computed again", stacklevel=3)
        result: Result | None = gather(found)[0]
        return result

    def _path(self, key: str, digest: str) -> Path | None:
        if self._cache is None:
            return None
        identity = json.dumps([*self._identity, key, digest], sort_keys=True)
        return self._cache / f"result-{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"

    def _write(self, out: Path) -> None:
        settings = {
            "format": FORMAT,
            "settings": self.settings,
            "data": self._data,
            "special_tokens": self._special_tokens,
        }
        for suffix, content in (("SETTINGS", settings), ("EVAL", self.results), ("SUMMARY", self.summary)):
            text = json.dumps(finite(content), indent=4, sort_keys=True)
            write_text(out / f"{self.name}_{suffix}.json", text + "\n")


def report_left_out(records: Sequence[dict]) -> None:
    """Print on stderr how many rows of each set are left out, the first of them and the reasons; one rank prints."""
    rows: dict[str, list[str]] = {}
    for record in records:
        rows.setdefault(record["set"], []).append(f"row {record['row']}: {record['reason']}")
    for name, own in rows.items():
        if is_first():
            more = "; ..." if len(own) > _PLACES else ""
            print(f"{name}: left out {len(own)}: {'; '.join(own[:_PLACES])}{more}", file=sys.stderr)
