"""Read records through the `datasets` library (the extra `[data]`): hub names, folders in hub layout, parquet files."""

import contextlib
import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

from moe_unlearn.errors import MissingLibraryError


def records(name: str, part: str | None, *, streaming: bool = False) -> Iterator[tuple[object, str]]:
    """Yield the pairs (record, where it stands) of one part of `name`, a hub data set or a folder in hub layout.

    `part` is "config/split", or one of the two where the other is clear. No code of a data set is run. With
    `streaming` nothing is copied to the cache of `datasets`. Raises MissingLibraryError, OSError for a name that
    cannot be found or reached, and ValueError for an unknown part, naming the known ones.
    """
    datasets = library()
    with _named(name, datasets):
        config, split = _config_and_split(name, part, datasets)
        loaded = datasets.load_dataset(name, config, split=split, streaming=streaming)
        if split is None:
            if len(loaded) != 1:
                raise ValueError(f"expected a split, one of {', '.join(loaded)}; got {part!r}")
            ((split, loaded),) = loaded.items()
        yield from _rows(loaded, "/".join(filter(None, (name, config, split))))


def parquet_records(path: Path, *, streaming: bool = False) -> Iterator[tuple[object, str]]:
    """Yield the pairs (record, where it stands) of a parquet file.

    Raises MissingLibraryError, FileNotFoundError or ValueError.
    """
    datasets = library()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a parquet file")
    with _named(str(path), datasets):
        yield from _rows(
            datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=streaming), str(path)
        )


def library() -> ModuleType:
    """Return the module `datasets`, or raise MissingLibraryError saying what to install."""
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise MissingLibraryError(
            "hub data sets, folders in hub layout and parquet files are read through the library 'datasets', which is "
            f'missing: pip install "moe-unlearn[data]" (.jsonl, .json and .txt files need nothing); {error}'
        ) from None


def _config_and_split(name: str, part: str | None, datasets: ModuleType) -> tuple[str | None, str | None]:
    if part is not None and "/" in part:
        # not checked here because, offline, `datasets` knows only the parts in its cache
        config, _, split = part.partition("/")
        return config, split
    configs = datasets.get_dataset_config_names(name)
    if part in configs:
        return part, None
    if len(configs) > 1 and "default" not in configs:
        raise ValueError(f"expected a part CONFIG/SPLIT with a config of {', '.join(configs)}; got {part!r}")
    return "default" if "default" in configs else configs[0], part


def _rows(loaded: Iterable[object], name: str) -> Iterator[tuple[object, str]]:
    for number, row in enumerate(loaded, 1):
        yield row, f"{name}, row {number}"


@contextlib.contextmanager
def _named(name: str, datasets: ModuleType) -> Iterator[None]:
    """Begin errors inside with the name of the source that could not be read."""
    try:
        yield
    except (FileNotFoundError, ConnectionError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ConnectionError
        raise kind(f"{name}: no file or folder here, and not to be had as a hub data set: {error}") from error
    except (datasets.exceptions.DatasetsError, ValueError) as error:
        raise ValueError(f"{name}: {error.__cause__ or error}") from error
