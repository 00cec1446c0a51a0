"""Reports say the same in every form, whatever stands in a message."""

import json
import math
from xml.etree import ElementTree

import pytest

from moe_unlearn.regress import report
from moe_unlearn.regress.numeric import Verdict
from moe_unlearn.regress.report import STATUSES, Result

RESULTS = [
    Result("a|b/c", "inaccurate", "line 1\nline <2> & \x00 |", (Verdict("o", "inaccurate", math.inf),), 1.5, "r.py"),
    Result("equal one", "equal", outputs=(Verdict("o", "equal", 1.0),), seconds=0.5),
    Result("other", "accurate", outputs=(Verdict("o", "accurate", 1.2), Verdict("p", "equal", math.nan))),
    Result("there", "unrecorded", "no record"),
]


@pytest.mark.quick
def test_text_shows_what_is_not_equal():
    text = report.text(RESULTS)
    assert "equal one" not in text and "equal one" in report.text(RESULTS, verbose=True)
    assert text.splitlines()[-1] == ("4 cases: 1 equal, 1 as accurate, 1 less accurate, 1 unrecorded (2.0 s)")
    assert "repro: r.py" in text and "error 1.2 x" in text
    assert report.summary([]) == "0 cases: none (0.0 s)"


def test_markdown_keeps_its_columns():
    lines = report.markdown(RESULTS).splitlines()
    assert len(lines) == 2 + 2 + len(RESULTS)
    assert {line.replace("\\|", "").count("|") for line in lines[2:]} == {6}


def test_json_and_junit_are_well_formed():
    made = json.loads(report.to_json(RESULTS, {"torch": "2"}))
    assert made["exit_code"] == 1 and made["results"][0]["outputs"][0]["error_ratio"] is None
    suite = ElementTree.fromstring(report.junit(RESULTS))
    assert (suite.attrib["tests"], suite.attrib["failures"], suite.attrib["errors"]) == ("4", "1", "1")
    assert [len(case) for case in suite] == [1, 0, 1, 1]


@pytest.mark.parametrize(
    "statuses, code",
    [
        (["equal", "accurate", "recorded", "unchanged", "accepted", "new"], 0),
        (["equal", "slower"], 1),
        (["environment", "inaccurate", "unrecorded"], 1),
        (["environment", "unrecorded"], 3),
        (["gone", "equal"], 2),
        ([], 0),
    ],
)
def test_exit_codes(statuses, code):
    assert report.exit_code([Result("x", status) for status in statuses]) == code


def test_every_status_has_a_code():
    assert set(STATUSES.values()) == {0, 1, 2, 3}
    with pytest.raises(KeyError):
        Result("x", "fine").code  # noqa: B018


def test_an_interrupted_report_leaves_the_former(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "out.json"
    report.write(path, "former")
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        report.write(path, "new")
    assert path.read_text(encoding="utf-8") == "former\n"
