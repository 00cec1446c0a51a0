"""The rates of the verdicts on recorded noise, and that the selftest fails when they are bad."""

import pytest

from moe_unlearn.regress import noise, selftest
from moe_unlearn.regress.fingerprint import cpu
from moe_unlearn.regress.selftest import Row, performance, table


def test_the_limits_hold_on_every_trace():
    rows = list(performance(noise.load()))
    assert len(rows) == 2 * len(noise.workloads())
    assert [row for row in rows if not row.passed] == []
    assert all(row.note.startswith("1000 comparisons") for row in rows)


def test_a_rash_rule_fails_the_selftest():
    """A threshold of nothing and an interval of half the distribution: what the limits are there for."""
    rows = list(performance(noise.load(), 200, threshold=1e-9, confidence=0.01))
    alarms = [row for row in rows if row.at_most]
    assert not any(row.passed for row in alarms)


def test_a_blind_rule_fails_the_selftest():
    rows = list(performance(noise.load(), 200, threshold=0.2))
    found = [row for row in rows if not row.at_most]
    assert not any(row.passed for row in found)


@pytest.mark.quick
def test_rows_and_their_limits():
    assert Row("a", 0.01, 0.01, at_most=True).passed and not Row("a", 0.01, 0.011, at_most=True).passed
    assert Row("b", 0.95, 0.95).passed and not Row("b", 0.95, 0.94).passed
    head, good, bad = table([Row("a", 0.01, 0.0, at_most=True, note="why"), Row("b", 1.0, 0.5)])
    assert head.split() == ["check", "limit", "measured", "verdict"]
    assert good.split() == ["a", "<=", "1%", "0.0%", "ok", "(why)"]
    assert bad.split() == ["b", ">=", "100%", "50.0%", "FAILED"]


def test_numbers_are_those_of_this_machine(monkeypatch):
    monkeypatch.setattr(selftest, "CORRECT", 60)
    bugs, changes, largest, rate = selftest.numbers()
    assert bugs.passed and changes.passed and largest.passed and rate.passed
    assert largest.note.startswith(cpu()) and "correct results" in largest.note
    (line,) = list(table([rate]))[1:]
    assert "<= 1e-07" in line


@pytest.mark.quick
def test_the_exit_code_follows_the_table(monkeypatch, capsys):
    monkeypatch.setattr(selftest, "defences", lambda: iter([Row("d", 1.0, 1.0)]))
    monkeypatch.setattr(selftest, "numbers", lambda: iter([]))
    monkeypatch.setattr(selftest, "performance", lambda traces, n: iter([Row("p", 0.01, 0.0, at_most=True)]))
    assert selftest.main([]) == 0
    assert capsys.readouterr().out.endswith("every limit is met\n")
    monkeypatch.setattr(selftest, "numbers", lambda: iter([Row("seeded bugs", 1.0, 0.99)]))
    assert selftest.main([]) == 1
    assert capsys.readouterr().out.endswith("failed: seeded bugs\n")


def test_the_real_clock():
    """A few comparisons, for what the command prints; its rates are measured by `selftest --real`."""
    same, slower = selftest.real(seconds=1.0)
    assert same.check == "real clock: false alarms" and slower.check == "real clock: 10% slower, found"
    assert same.measured <= 0.5
