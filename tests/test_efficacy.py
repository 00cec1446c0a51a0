"""RESULTS.md's section on the levers says what a recorded study says, and the sentences follow from its numbers."""

import json

import pytest

from benchmarks import efficacy, study_reading


def value(mean, half=None, n=5):
    return {"mean": mean, "half": half, "n": n}


def row(variant, retain, near, difference=None, near_difference=None, *, reached=5, against=0.0):
    return {
        "case": "builtin:pydoc",
        "baseline": "NPO",
        "variant": variant,
        "runs": 5,
        "reached": reached,
        "verbmem_r": retain,
        "verbmem_r_near": near,
        "difference": {"verbmem_r": difference},
        "difference_near": {"verbmem_r": near_difference},
        "against_strongest": value(against, 1.0),
        "against_strongest_near": value(2 * against, 1.0),
    }


def point(ratio, ess, before, after):
    norms = {"uniform": {"critical": 2.0, "others": 1.0}, "weighted": {"critical": 5.0, "others": 0.5}}
    return {
        "ratio": ratio,
        "ess": ess,
        "nll_c near": [before, after],
        "nll_r near": [1.0, 1.0],
        "target": norms,
        "gradients": norms,
    }


@pytest.fixture
def study():
    return {
        "command": "python -m benchmarks.study",
        "runs": 9,
        "of": 10,
        "near": 0.1,
        "figures": {"levers.png": "Levers"},
        "main": [
            row("plain", value(0.444), value(0.7)),
            row("TRACE", value(0.5), value(0.7), value(0.056, 0.05), value(-0.01, 0.02), against=4.6),
            row("MOLLM", value(None, None, 0), value(0.9), value(None, None, 0), value(0.2, None, 1), reached=0),
        ],
        "mismatch": [point(2.0, 0.9, 1.0, 0.5), point(3.0, 0.8, 1.0, 0.6), point(4.0, 0.7, 1.0, 2.0)],
        "ablation": [
            {
                "case": "c",
                "baseline": "NPO",
                "variant": "TRACE, random-experts",
                "runs": 5,
                "difference": {"verbmem_r": value(None, None, 0)},
                "difference_near": {"verbmem_r": value(-0.1, 0.02)},
            }
        ],
    }


def recorded(tmp_path, study, name="small"):
    folder = tmp_path / "results" / "study" / name
    folder.mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps(study), encoding="utf-8")


@pytest.mark.quick
def test_the_table_marks_what_is_clear_and_what_got_nowhere(tmp_path, study):
    recorded(tmp_path, study)
    text = efficacy.generated(tmp_path / "results", tmp_path)
    assert "| builtin:pydoc, 5 seeds | plain | TRACE | WAGLE | MOLLM | all three |" in text
    assert "| NPO | 0.44 / 0.70 | **+0.06** / -0.01 | – | – / +0.20 (0/5) | – |" in text
    assert "| c, NPO | TRACE, random-experts | – | -0.100 ± 0.020 | 5 |" in text
    assert "9 of 10 runs" in text and "![Levers](results/study/small/levers.png)" in text


def test_the_whole_study_comes_before_the_small_one(tmp_path, study):
    assert efficacy.generated(tmp_path, tmp_path) == "No study is recorded yet."
    recorded(tmp_path, study)
    recorded(tmp_path, study | {"runs": 500}, "whole")
    assert "500 of 10 runs" in efficacy.generated(tmp_path / "results", tmp_path)


@pytest.mark.quick
def test_sentences_follow_from_the_numbers(study):
    goal, critical, every, norms = study_reading.reading(study)
    assert "not reached, where the best baseline with TRACE alone is NPO, +4.6 ± 1.0 %" in goal
    assert "reached at the looser level, where the best baseline with TRACE alone is NPO, +9.2 ± 1.0 %" in goal
    # the geometric mean of 0.5, 0.6 and 2 is 0.843; both orders are the effect's, one of them reversed
    assert "by -16 % on tokens of critical experts (geometric mean of 3 paired runs, lower in 2)" in critical
    assert "+1.00 (p 0) with f^F/f^R" in critical and "-1.00 (p 0) with the effective sample size" in critical
    assert "by +0 % on all" in every and "nan" not in every
    assert "of a critical expert by 2.50 and that of another by 0.50" in norms


@pytest.mark.quick
def test_runs_are_split_by_their_mismatch(study):
    retained = {5.0: 0.3, 1.5: 0.19, 2.0: 0.22, 4.0: 0.22}
    study["mismatch"] = [point(r, 0.5, 1.0, 1.0) | {"verbmem_r near": [0.2, v]} for r, v in retained.items()]
    (sentence,) = [found for found in study_reading.reading(study) if "in the half of these runs" in found]
    # +50 and +10 % above the median ratio, -5 and +10 % below: t of two values is 12.7
    assert "by +30.0 ± 254.1 % in the half of these runs with the stronger mismatch (f^F/f^R from 4.0 on)" in sentence
    assert "by +2.5 ± 95.3 % in the other" in sentence
    assert study_reading.reading(study)[1].count("not defined") == 2  # nothing varies: no rank correlation
