"""The section of RESULTS.md on the router lever says what the record has."""

import json

import pytest

from benchmarks import router_table

pytestmark = pytest.mark.quick


def test_a_row_of_the_record_is_a_row_of_the_table(tmp_path):
    assert router_table.table(tmp_path) == "No run is recorded yet."
    row = {"recipe": "mollm", "mode": "invariant", "seed": 7, "stability_seen": 0.987, "stability_unseen": 0.5,
           "verbmem_f": 0.1, "verbmem_r": 0.9, "knowmem_f": 0.2, "knowmem_r": 0.8,
           "former routers bring back": 0.07, "former routes bring back": -0.2}  # fmt: skip
    record = {"stamp": {"versions": {"torch": "2.13.0"}, "commit": None}, "rows": [row]}
    (tmp_path / router_table.FILE).write_text(json.dumps(record), encoding="utf-8")
    text = router_table.table(tmp_path)
    assert "seed 7" in text and "commit unknown" in text
    expected = "| mollm | invariant | 98.7 % | 50.0 % | 0.100 | 0.900 | 0.200 | 0.800 | +0.070 | -0.200 |"
    assert text.splitlines()[-1] == expected
