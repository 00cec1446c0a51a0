"""The order in which workers take the files of tests: what takes long first, so that none is left alone with it."""

import collections
from collections.abc import Iterable

# where few tests take long; a name ends in "/" if it is a folder's
LONG = (
    "tests/sharding/",
    "tests/static/",
    "tests/trust/",
    "tests/regress/test_revision.py",
    "tests/test_bench_size.py",
    "tests/test_benchmarks_end_to_end.py",
    "tests/test_exactness.py",
    "tests/test_mutants.py",
    "tests/test_study.py",
)


def in_order(nodeids: Iterable[str]) -> list[str]:
    """Return the files of tests with these ids: those of `LONG`, then the others; of each the larger ones first."""
    counts = collections.Counter(nodeid.partition("::")[0] for nodeid in nodeids)
    return sorted(counts, key=lambda file: (not file.startswith(LONG), -counts[file]))
