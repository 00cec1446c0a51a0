"""The seeded bugs: at least thirty, all found; and the corpus would notice a criterion that lets everything pass."""

from collections import Counter

import pytest

from moe_unlearn.regress import numeric, seeded


def test_all_are_found_and_no_harmless_change_is():
    outcome = seeded.run()
    assert outcome.bugs >= 30 and outcome.changes >= 10
    assert not outcome.missed and not outcome.alarms, str(outcome)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_on_other_seeds(seed):
    outcome = seeded.run(seed=seed)
    assert not outcome.missed and not outcome.alarms, str(outcome)


def test_the_corpus_is_broad():
    kinds = Counter(bug.kind for bug in seeded.BUGS)
    wanted = {
        "index",
        "mask",
        "stride",
        "dtype",
        "accumulation",
        "initialisation",
        "off by one",
        "sign",
        "dropped expert",
        "scale",
        "precision",
        "stale row",
    }
    assert wanted <= set(kinds)
    titles = [(bug.case, bug.kind, bug.name) for bug in seeded.BUGS]
    assert len(titles) == len(set(titles))


@pytest.mark.quick
def test_a_blind_criterion_is_noticed(monkeypatch):
    monkeypatch.setattr(numeric, "assert_as_accurate", lambda *arguments, **keywords: None)
    bugs = [bug for bug in seeded.BUGS if bug.case == "running_sum"]
    outcome = seeded.run(bugs, [])
    assert outcome.found == 0 and len(outcome.missed) == len(bugs)


def test_rows_for_the_table(monkeypatch):
    monkeypatch.setattr(seeded, "BUGS", seeded.BUGS[-3:])
    monkeypatch.setattr(seeded, "CHANGES", seeded.CHANGES[-1:])

    def row(check, limit, measured, at_most=False, note=""):
        return check, limit, measured, at_most

    bugs, changes = seeded.rows(row)
    assert bugs[1:] == (1.0, 1.0, False) and changes[1:] == (0.0, 0.0, True)
