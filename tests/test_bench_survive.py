"""The table of what rounding leaves of unlearning says which way is nearer to the unlearned model."""

import pytest

from benchmarks import survive_table

pytestmark = pytest.mark.quick


def seed(number, plain, held):
    """A seed whose rounding moves the NLL of every side by `plain`, and by `held` with survive."""
    sides = dict.fromkeys(survive_table.METRICS, 4.0)
    moved = {
        kind: {side: 4.0 + by for side in sides} for kind, by in (("plain, rounded", plain), ("held, rounded", held))
    }
    return {"seed": number, "found": {"learned": sides, "plain": sides, "held": sides, **moved}}


@pytest.mark.parametrize(
    ("held", "verdict"),
    [(0.01, "better"), (0.9, "worse"), (None, "no clear difference")],
    ids=["less", "more", "either"],
)
def test_the_verdict_is_that_of_the_interval(held, verdict):
    rows = [seed(i, -0.1 - i / 100, (held or (0.05, 0.2)[i % 2]) + i / 1000) for i in range(4)]
    text = survive_table.table(rows)
    assert text.count(f": {verdict}.") == 3 and "4 seeds" in text and "moves it by 0.115 nats a token" in text
    last = text.splitlines()[-1]
    assert ("beats plain on: none of them. " in last and last.endswith(" failed to.")) == (verdict != "better")


def test_the_page_says_so_where_nothing_was_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(survive_table, "FILE", tmp_path / "none.jsonl")
    assert survive_table.generated() == "No run is recorded yet."
