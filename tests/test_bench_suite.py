"""A run of the suite: within its time, one file that is whole or says what is lacking, a worker that may break."""

import functools
import json
import sys
import tempfile

import pytest

from benchmarks import record, stamp, suite
from benchmarks.harness import Case
from benchmarks.journal import Journal, read

HEAD = {
    "stamp": {"device": "cpu", "commit": "0123456789ab"},
    "fingerprint": {"device": "cpu"},
    "kernels": "k",
    "time": "processor",
    "ceilings": {},
}


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def cases(*seconds, op="op"):
    return [Case(op, f"case {i}", ("ours",), dict, seconds=s) for i, s in enumerate(seconds)]


@pytest.fixture
def run(tmp_path):
    clock = Clock()

    def conduct(chosen, ask, seconds=100.0, **head):
        own = record.Record(tmp_path / "run.json", {**HEAD, **head})
        asked = functools.partial(ask, clock)
        suite.conduct(chosen, asked, own, seconds=seconds, clock=clock, start=0.0, say=lambda line: None)
        assert json.loads(own.path.read_text(encoding="utf-8")) == own.content
        assert not list(tmp_path.glob("*.partial"))
        return own.content, clock.now

    return conduct


def takes(factor):
    def ask(clock, title, left):
        clock.now += factor * float(title.rpartition(" ")[2] == "0" and 1 or 10)
        return {"op": "op", "name": title.partition(": ")[2], "verdicts": []}

    return ask


@pytest.mark.quick
def test_a_run_ends_in_time_and_says_what_it_left_out(run):
    content, end = run(cases(1, 10, 10, 10, 10), takes(1), seconds=25)
    assert end <= 25
    assert ["skipped" in row for row in content["rows"]] == [False, False, False, True, True]
    assert content["rows"][3]["skipped"] == "4 s of 25 were left; it takes about 10"
    assert content["state"] == "partial: 2 of 5 cases left out for lack of time"


@pytest.mark.quick
def test_a_slow_machine_is_noticed_before_it_costs_the_time(run):
    content, end = run(cases(1, 10, 10, 10), takes(3), seconds=50)
    assert end == 33 and ["skipped" in row for row in content["rows"]] == [False, False, True, True]


def test_a_cheap_case_behind_a_dear_one_still_runs(run):
    chosen = [*cases(1), *cases(500, op="dear"), *cases(2, op="cheap")]
    content, _ = run(chosen, takes(1), seconds=20)
    assert ["skipped" in row for row in content["rows"]] == [False, True, False]


def test_a_whole_run_is_complete_and_a_part_is_not(run):
    assert run(cases(1, 1), takes(0.1))[0]["state"] == record.COMPLETE
    assert run(cases(1, 1), takes(0.1), only="route")[0]["state"] == "partial: only 'route'"


@pytest.mark.quick
def test_a_case_that_breaks_its_worker_costs_itself_alone(run):
    def ask(clock, title, left):
        clock.now += 1
        if title.endswith("1"):
            raise suite.Broken("its process ended with status -11: CUDA error")
        return {"op": "op", "name": title, "verdicts": []}

    content, _ = run(cases(1, 1, 1), ask)
    assert [row.get("error") for row in content["rows"]] == [
        None,
        "its process ended with status -11: CUDA error",
        None,
    ]
    assert content["state"] == "partial: 1 of 3 cases failed"
    assert "ERROR: its process" in suite.line(content["rows"][1])


def test_a_case_that_the_end_of_the_run_cuts_off_is_left_out_and_no_failure(run):
    def ask(clock, title, left):
        clock.now += left
        raise suite.Broken(f"no end within {left:.0f} s")

    content, _ = run(cases(1), ask, seconds=20)
    assert content["rows"][0]["skipped"] == "no end within 20 s"
    assert content["state"] == "partial: 1 of 1 cases left out for lack of time"


def test_what_was_measured_survives_a_stop(tmp_path):
    own = record.Record(tmp_path / "run.json", HEAD)
    own.add({"op": "op", "name": "first"}, 2.0)
    content = json.loads(own.path.read_text(encoding="utf-8"))  # what is there when the power goes
    assert content["rows"] == [{"op": "op", "name": "first"}] and content["state"] == record.RUNNING


@pytest.mark.quick
def test_no_run_replaces_another_and_a_complete_one_is_shown(tmp_path):
    paths = []
    for state, started in ((record.COMPLETE, 1), ("partial: one", 2), (record.COMPLETE, 3), (record.RUNNING, 4)):
        paths.append(record.new_path("NVIDIA H200", "0123456789ab", "2026-01-02", tmp_path))
        record.Record(paths[-1], HEAD | {"started": started})
        paths[-1].write_text(json.dumps({**HEAD, "started": started, "state": state, "rows": []}), encoding="utf-8")
    assert [p.name for p in paths] == [
        "2026-01-02-012345678.json",
        *(f"2026-01-02-012345678-{n}.json" for n in (2, 3, 4)),
    ]
    assert record.latest("nvidia-h200", tmp_path)[0] == paths[2]
    paths[0].unlink()
    paths[2].unlink()
    assert record.latest("nvidia-h200", tmp_path)[0] == paths[3]
    assert record.latest("cpu", tmp_path) is None


def test_a_row_for_people_names_target_and_reason():
    row = {"op": "op", "name": "n", "milliseconds": {"ours": 1.0}, "missing": {"peer": "its kernels need a GPU"},
           "verdicts": [{"what": "times as fast as x", "value": 2.0, "target": 3.0, "hit": False, "low": 1.9, "high": 2.1}]}  # fmt: skip # noqa: E501
    text = suite.line(row)
    assert "target 3: MISSED" in text and "[1.90, 2.10]" in text
    assert "not measured: peer: its kernels need a GPU" in text


@pytest.mark.quick
def test_a_case_that_fails_keeps_where_it_failed():
    def make():
        raise ValueError("no such shape\nand more")

    row = suite.measured(Case("op", "n", ("ours",), make), "cpu", {})
    assert row["error"] == "ValueError: no such shape" and "in make" in row["trace"] and "and more" in row["trace"]


@pytest.mark.quick
def test_what_a_case_has_by_the_end_of_the_run_is_kept(run):
    def ask(clock, title, left):
        clock.now += left
        error = suite.Broken(f"no end within {left:.0f} s")
        error.row = {"op": "op", "name": "case 0", "milliseconds": {"ours": 1.0}}
        raise error

    (row,) = run(cases(1), ask, seconds=20)[0]["rows"]
    assert row["milliseconds"] == {"ours": 1.0} and row["cut"] == "no end within 20 s" and "skipped" not in row
    assert "not to its end" in suite.line(row) and "not to their end" in record.state_of([row])


def test_a_run_can_be_lines_of_a_journal(tmp_path):
    lines = record.Lines(Journal(tmp_path / "gpu-2-x.jsonl", "ops"), HEAD)
    suite.conduct(
        cases(1, 1),
        functools.partial(takes(1), Clock()),
        lines,
        seconds=50,
        clock=Clock(),
        start=0.0,
        say=lambda line: None,
    )
    found = read(tmp_path / "gpu-2-x.jsonl")
    assert [line["kind"] for line in found] == ["environment", "case", "case"]
    assert found[0]["head"] == HEAD and [line["row"]["name"] for line in found[1:]] == ["case 0", "case 1"]
    assert {line["stage"] for line in found} == {"ops"} and lines.finish() == record.COMPLETE


@pytest.mark.quick
def test_parts_and_tiers_are_chosen():
    ops = suite.cases("cuda", part="ops", tiers=[0])
    steps = suite.cases("cuda", part="steps")
    assert {case.op for case in steps} == {"step"} and "step" not in {case.op for case in ops}
    assert [suite.restriction("route", ""), suite.restriction("", "0,1"), suite.restriction("", "")] == [
        "route",
        "tier 0,1",
        "",
    ]
    assert {case.tier for case in ops} == {0} and len(suite.cases("cuda", tiers=[1])) < len(suite.cases("cuda"))


@pytest.mark.quick
def test_cases_that_earlier_runs_of_these_kernels_measured_can_be_left_out(tmp_path, monkeypatch, capsys):
    chosen = [case.title for case in suite.cases("cuda", part="steps")]
    earlier = Journal(tmp_path / "gpu-2-a.jsonl", "steps")
    earlier.write("stamp", stamp={"kernel_sources": stamp.kernel_sources_hash()})
    for title, more in zip(chosen, ({"milliseconds": {"ours": 1}}, {"skipped": "no time"}), strict=False):
        earlier.write("case", row={"op": "step", "name": title.partition(": ")[2], **more})
    options = ["suite", "--device", "cuda", "--part", "steps", "--left", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*options, "--list"])
    assert suite.main() == 0
    listed = capsys.readouterr().out
    assert chosen[0] not in listed and all(title in listed for title in chosen[1:])
    monkeypatch.setattr("sys.argv", [*options, "--only", chosen[0]])
    assert suite.main() == 0 and "all of it is measured" in capsys.readouterr().out


WORKER = """
import sys, time, os
for line in sys.stdin:
    if "die" in line:
        print("the last words", file=sys.stderr); os._exit(3)
    if "hang" in line:
        print('{"partial": {"op": "op", "name": "so far"}}', flush=True)
        time.sleep(60)
    print('{"op": "op", "name": "%s"}' % line.strip(), flush=True)
"""


def test_a_worker_that_dies_or_hangs_is_started_again():
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        worker = suite.Worker([sys.executable, "-c", WORKER], log)
        try:
            assert worker.ask("a", 30)["name"] == "a"
            first = worker.process.pid
            assert worker.ask("b", 30)["name"] == "b" and worker.process.pid == first
            with pytest.raises(suite.Broken, match="status 3: the last words") as died:
                worker.ask("die", 30)
            assert died.value.trace.endswith("the last words\n")
            with pytest.raises(suite.Broken, match="no end within 1 s") as hung:
                worker.ask("hang", 1)
            assert hung.value.row == {"op": "op", "name": "so far"}
            with pytest.raises(suite.Broken) as dead:
                worker.ask("die", 30)
            assert dead.value.row is None
            assert worker.ask("c", 30)["name"] == "c"
        finally:
            worker.stop()
        assert worker.process is None
