"""What comes back from a GPU becomes records, tables and the choice of implementations."""

import json
import shutil
import subprocess
import sys

import pytest

from benchmarks import gpu_report, readme, record, stamp
from benchmarks.journal import Journal
from benchmarks.model import design, gpus
from moe_unlearn import choices
from tests.gpu_stages import ROOT

pytestmark = pytest.mark.quick

WHERE = {
    "device": "NVIDIA H200",
    "driver": "580",
    "commit": None,
    "uncommitted_changes": False,
    "kernel_sources": "now",
    "versions": {"torch": "2.11"},
}
HEAD = {
    "stamp": WHERE,
    "kernels": "now",
    "time": "CUDA events",
    "ceilings": {"flops": {}, "bytes": 1e12},
    "fingerprint": {"device": "cuda", "torch": "2.11"},
    "started": 1.8e9,
    "budget": 85.0,
}
NAMES = {"triton": "ours, triton", "cuda": "ours, cuda"}


def row(name, triton, cuda, *choice, **more):
    verdict = {"what": "times as fast as rival", "value": 2.0, "target": 3.0, "hit": False}
    return {
        "op": "route",
        "name": name,
        "milliseconds": {"ours": 1.0, NAMES["triton"]: triton, NAMES["cuda"]: cuda},
        "verdicts": [verdict],
        "missing": {},
        "choice": list(choice),
        **more,
    }


def leaves_tests(folder, name="gpu-1-20260101T000000", where=WHERE, outcome="passed", stages=("matrix",), end=True):
    journal = Journal(folder / f"{name}.jsonl", "matrix")
    Journal(journal.path).write("begin", command=1, stages=dict.fromkeys(stages, 9.0))
    if where:
        Journal(journal.path, "install").write("stamp", stamp=where)
    journal.write("collected", tests=2)
    for i in range(2):
        journal.write("test", name=f"t{i}", outcome=outcome if i else "passed", seconds=0.1, why="no", triton=[1, 2])
    if end:
        journal.write("stage", state="ended", status=0, cut=False, seconds=5.0, limit=9.0)


def leaves_cases(folder, *rows, name="gpu-2-20260101T000500", where=WHERE):
    journal = Journal(folder / f"{name}.jsonl", "ops")
    Journal(journal.path).write("begin", command=2, stages={"ops": 9.0})
    Journal(journal.path, "install").write("stamp", stamp=where)
    journal.write("environment", head=HEAD | {"stamp": where})
    for one in rows:
        journal.write("case", row=one)
    journal.write("stage", state="ended", status=0, cut=False, seconds=7.0, limit=9.0)


@pytest.fixture
def place(tmp_path):
    """(what came back, results, choices.json), and a function that reports."""
    back, results, file = tmp_path / "back", tmp_path / "results", tmp_path / "choices.json"
    shutil.copy(choices.FILE, file)

    def report():
        return gpu_report.report(back, results=results, choices_file=file)

    return back, results, file, report


def test_both_commands_become_a_record_of_each_kind_and_the_choice(place):
    back, results, file, report = place
    leaves_tests(back / "first")
    leaves_cases(back / "second", row("a", 2.0, 1.0, "route", 100), row("b", 1.0, 3.0, "expert_wgrad.adamw", 500))
    lines, found = report()
    assert found == []
    correctness = json.loads((results / "nvidia-h200/correctness.json").read_text(encoding="utf-8"))
    assert correctness["tests"] == {"matrix": {"passed": 2}} and correctness["complaints"] == []
    assert correctness["triton"] == {"found": 2, "compiled": 4} and correctness["stamp"]["device"] == "NVIDIA H200"
    path, run = record.latest("nvidia-h200", results)
    assert run["state"] == record.COMPLETE and len(run["rows"]) == 2 and run["seconds"] == 12.0
    made = json.loads(file.read_text(encoding="utf-8"))
    assert made["cuda"]["route"] == [{"elements": 0, "first": "cuda"}]
    assert made["cuda"]["expert_wgrad.adamw"] == [{"elements": 0, "first": "triton"}]
    assert made["cuda"]["expert_wgrad.sgd"] == choices.table()["cuda"]["expert_wgrad.sgd"]
    assert made["measured"] == {"device": "NVIDIA H200", "commit": None, "kernel_sources": "now"}
    assert any(str(path) in line for line in lines)


def test_a_report_made_again_replaces_itself_and_another_run_does_not(place):
    back, results, _, report = place
    leaves_cases(back, row("a", 2.0, 1.0, "route", 100))
    report()
    report()
    assert len(record.runs(results)["nvidia-h200"]) == 1
    leaves_cases(back, row("b", 2.0, 1.0, "route", 100), name="gpu-2-20260101T001000")
    report()  # a third run that goes on where the second stopped
    (path,) = record.runs(results)["nvidia-h200"]
    assert {r["name"] for r in json.loads(path.read_text(encoding="utf-8"))["rows"]} == {"a", "b"}
    for old in back.iterdir():
        old.unlink()
    leaves_cases(back, row("c", 2.0, 1.0, "route", 100), name="gpu-2-20260202T000000")
    report()
    assert len(record.runs(results)["nvidia-h200"]) == 2


def test_what_was_predicted_stands_beside_what_was_measured(place):
    back, results, _, report = place
    name = "Qwen3-30B-A3B, 8192 tokens, uniform, forward"
    leaves_cases(back, row("a", 2.0, 1.0, "route", 100), row(name, 2.0, 1.0, "route", 100) | {"op": "expert_mlp"})
    lines, _ = report()
    (line,) = [line for line in lines if ", ours: predicted " in line]
    predicted = design.by_case(gpus.H200)[f"expert_mlp: {name}"]["ours"]
    figures = f"predicted {predicted:.4g} ms, measured 1 ms: the prediction is {predicted - 1:+.0%} off"
    assert line == f"expert_mlp: {name}, ours: {figures}"
    (cells,) = [line for line in readme.generated(results, results.parent).splitlines() if f" {name} | ours |" in line]
    assert cells.endswith(f"| ours | {predicted:.3g} | 1 | {predicted:.2f} |")


def test_runs_of_other_kernels_another_device_or_without_a_stamp_are_left_out_and_named(place):
    back, results, _, report = place
    leaves_tests(back, "gpu-1-1", WHERE | {"kernel_sources": "old"}, outcome="failed")
    leaves_tests(back, "gpu-1-2", WHERE | {"device": "NVIDIA A100"}, outcome="failed")
    leaves_tests(back, "gpu-1-3", None)
    leaves_tests(back, "gpu-1-4")
    lines, found = report()
    assert found == [] and sum("left out: gpu-1-" in line for line in lines) == 3
    correctness = json.loads((results / "nvidia-h200/correctness.json").read_text(encoding="utf-8"))
    assert correctness["runs"] == ["gpu-1-4"]


def test_failures_and_what_was_not_run_are_complaints(place):
    back, results, _, report = place
    leaves_tests(back, outcome="failed", stages=("matrix", "sanitizer"))
    _, found = report()
    assert [str(f) for f in found] == ["FAILED: matrix: t1: no", "not run: sanitizer: the run ended before it did"]
    correctness = json.loads((results / "nvidia-h200/correctness.json").read_text(encoding="utf-8"))
    assert correctness["complaints"] == [str(f) for f in found]


def test_nothing_to_report_is_said_and_nothing_is_written(place, capsys):
    back, results, _, report = place
    leaves_tests(back, where=None)
    assert report() is None and not results.exists()
    assert gpu_report.main([str(back)]) == 2 and str(back) in capsys.readouterr().err


def test_the_commit_is_this_checkout_s_where_the_kernels_are_the_same():
    here = stamp.stamp()
    same = WHERE | {"kernel_sources": here["kernel_sources"]}
    assert gpu_report.completed(same)["commit"] == here["commit"]
    assert gpu_report.completed(WHERE)["commit"] is None
    assert gpu_report.completed(same | {"commit": "abc"})["commit"] == "abc"


def test_the_choice_changes_between_sizes_with_different_winners():
    rows = [row("a", 1.0, 2.0, "route", 100), row("b", 2.0, 1.0, "route", 10_000), row("c", 2.0, 1.0, "route", 10**6)]
    assert gpu_report.choice(rows, {}) == {
        "route": [{"elements": 0, "first": "triton"}, {"elements": 1000, "first": "cuda"}]
    }


def test_rows_of_one_size_count_together_and_a_narrow_win_changes_nothing():
    mixed = [row("a", 1.0, 1.5, "x", 9), row("b", 3.0, 1.0, "x", 9)]
    assert gpu_report.choice(mixed, {})["x"] == [{"elements": 0, "first": "cuda"}]
    narrow = [row("a", 1.0, 1.02, "x", 9)]
    assert gpu_report.choice(narrow, {}) == {"x": [{"elements": 0, "first": "cuda"}]}
    before = {"x": [{"elements": 0, "first": "triton"}], "y": [{"elements": 0, "first": "triton"}]}
    assert gpu_report.choice([row("a", 1.02, 1.0, "x", 9)], before) == before


def test_rows_without_both_decide_nothing():
    one = row("a", 1.0, 2.0, "x", 9)
    del one["milliseconds"][NAMES["cuda"]]
    assert gpu_report.choice([one, {"op": "o", "name": "n", "skipped": "no time"}], {}) == {}


def test_the_table_of_results_has_the_device_and_its_tests(place, tmp_path):
    back, results, _, report = place
    leaves_tests(back / "first", outcome="failed")
    leaves_cases(back / "second", row("a", 2.0, 1.0, "route", 100))
    report()
    text = readme.generated(results, tmp_path)
    assert (
        "NVIDIA H200, torch 2.11, CUDA events time" in text
        and "| route: a | times as fast | rival | 2.00 | 3 |" in text
    )
    assert "matrix: 1 passed, 1 failed; memcheck: not run; 1 failures and tests not run" in text.replace(
        "1 failed, 1 passed", "1 passed, 1 failed"
    )
    assert readme.STALE in text


@pytest.mark.slow
def test_the_stub_s_runs_can_be_reported(place):
    back, _, _, report = place
    for command in ("1", "2"):
        run = [sys.executable, "-m", "tests.gpu_run", command, "--stub", "0", "--out", str(back)]
        assert subprocess.run(run, cwd=ROOT, capture_output=True).returncode == 0
    lines, found = report()
    assert found == [] and "cases measured" in lines[0]
