"""Workers take first what takes long."""

import pytest

from tests.support.order import LONG, in_order
from tests.support.sources import ROOT

pytestmark = pytest.mark.quick


def test_what_takes_long_comes_first_and_of_the_others_the_larger():
    few, many, long = ("tests/a.py::one",), [f"tests/b.py::two[{i}]" for i in range(3)], (f"{LONG[0]}test_c.py::three",)
    assert in_order([*few, *many, *long]) == [f"{LONG[0]}test_c.py", "tests/b.py", "tests/a.py"]


def test_what_takes_long_is_there():
    assert [
        name for name in LONG if not ((ROOT / name).is_dir() if name.endswith("/") else (ROOT / name).is_file())
    ] == []
