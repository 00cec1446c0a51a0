"""A run of the suite: within its time, one file that is whole or says what is lacking, a worker that may break."""

import functools
import json
import sys
import tempfile

import pytest

from benchmarks import record, suite
from benchmarks.harness import Case

HEAD = {"stamp": {"device": "cpu", "commit": "0123456789ab"}, "fingerprint": {"device": "cpu"}, "kernels": "k",
        "time": "processor", "ceilings": {}}  # fmt: skip


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


WORKER = """
import sys, time, os
for line in sys.stdin:
    if "die" in line:
        print("the last words", file=sys.stderr); os._exit(3)
    if "hang" in line:
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
            with pytest.raises(suite.Broken, match="status 3: the last words"):
                worker.ask("die", 30)
            with pytest.raises(suite.Broken, match="no end within 1 s"):
                worker.ask("hang", 1)
            assert worker.ask("c", 30)["name"] == "c"
        finally:
            worker.stop()
        assert worker.process is None
