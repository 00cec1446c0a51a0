"""A GPU run without one: limits, lines that survive whatever ends the run, and what they amount to."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_summary, journal
from benchmarks.journal import Journal, of_kind, read
from tests import gpu_run
from tests.gpu_stages import ROOT, WHEELS, Stage, commands

POINTS = 20
PAUSE = 0.01


def started(command: int, out: Path, pause: float = PAUSE) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.gpu_run", str(command), "--stub", str(pause), "--out", str(out)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def lines_in(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob(f"*{journal.SUFFIX}"))


def whole(command: int, out: Path) -> list[dict]:
    process = started(command, out)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    (path,) = out.glob(f"*{journal.SUFFIX}")
    return read(path)


@pytest.mark.slow
@pytest.mark.parametrize("command", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_killed_at_any_point_a_run_leaves_a_record_that_can_be_merged(command, tmp_path):
    total = len(whole(command, tmp_path / "whole"))
    seen = []
    for point in range(POINTS):
        out, least = tmp_path / f"killed-{point:02}", 1 + point * (total - 2) // (POINTS - 1)
        process = started(command, out)
        while lines_in(out) < least and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        process.wait()
        (path,) = out.glob(f"*{journal.SUFFIX}")
        left = read(path)
        assert len(left) >= least and path.read_bytes().endswith(b"\n")
        assert len(left) == path.read_bytes().count(b"\n"), "a line is torn"
        # nothing failed, and nobody takes a part for the whole; the last line adds nothing to tests that are all there
        found = gpu_summary.findings([left])
        assert gpu_summary.status_of(found) in ((3,) if len(left) < total - 1 else (0, 3)), (point, found)
        assert gpu_summary.table([left])
        seen.append(len(left))
    assert min(seen) < 4 and max(seen) > total - 4 and len(set(seen)) > POINTS // 2
    time.sleep(5 * PAUSE + 0.2)
    sizes = [lines_in(tmp_path / f"killed-{point:02}") for point in range(POINTS)]
    assert sizes == seen, "a stage went on after the run was dead"
    runs = list(journal.runs(tmp_path).values())
    assert len(runs) == POINTS + 1 and gpu_summary.findings(runs) == []
    one = list(journal.runs(tmp_path / "whole").values())
    assert gpu_summary.tests(runs).keys() == gpu_summary.tests(one).keys()
    assert {r["name"] for r in gpu_summary.cases(runs)} == {r["name"] for r in gpu_summary.cases(one)}


@pytest.mark.slow
def test_asked_to_end_a_run_ends_its_stage_and_prints_what_is_there(tmp_path):
    process = started(1, tmp_path, pause=0.3)
    while lines_in(tmp_path) < 5:
        time.sleep(0.01)
    process.terminate()
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 3 and "not run: matrix" in output and "stopped: True" in output
    before = lines_in(tmp_path)
    time.sleep(0.5)
    assert lines_in(tmp_path) == before


@pytest.mark.quick
def test_a_file_cut_at_any_byte_gives_the_lines_before_the_cut_and_can_be_continued(tmp_path):
    path = tmp_path / "run.jsonl"
    for i in range(12):
        Journal(path, "matrix").write("test", name=f"täst {i}", outcome="passed", why="x\ny", seconds=0.1)
    content = path.read_bytes()
    for point in range(POINTS):
        cut = len(content) * point // (POINTS - 1)
        path.write_bytes(content[:cut])
        kept = content[:cut].count(b"\n") + (content[cut - 1 : cut] == b"}")
        assert [line["name"] for line in read(path)] == [f"täst {i}" for i in range(kept)]
        Journal(path, "matrix").write("note", after=True)
        assert len(read(path)) == kept + 1 and read(path)[-1]["after"]


@pytest.mark.quick
def test_of_two_copies_of_a_run_the_longer_one_counts(tmp_path):
    for folder, lines in (("a", 2), ("b", 3)):
        for i in range(lines):
            Journal(tmp_path / folder / "gpu-1-x.jsonl").write("note", i=i)
    Journal(tmp_path / "gpu-2-y.jsonl").write("note")
    assert {name: len(lines) for name, lines in journal.runs(tmp_path).items()} == {"gpu-1-x": 3, "gpu-2-y": 1}


# ---- stages and their limits -----------------------------------------------------------------------------------


def stage(name, seconds, code):
    return Stage(name, seconds, "", ("-c", code))


def conducted(tmp_path, *stages, seconds=60.0):
    path = tmp_path / "gpu-1-x.jsonl"
    Journal(path).write("begin", command=1, stages={s.name: s.seconds for s in stages})
    gpu_run.conduct(stages, path, seconds=seconds, environment=dict(os.environ))
    return path, {line["stage"]: line for line in of_kind(read(path), "stage") if line["state"] == "ended"}


def test_a_stage_that_takes_too_long_is_ended_with_all_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "GRACE", 0.3)
    stubborn = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    start = time.monotonic()
    path, ends = conducted(tmp_path, stage("hangs", 5.0, stubborn), stage("next", 5.0, "print('hello')"))
    assert time.monotonic() - start < 15
    assert ends["hangs"]["cut"] and ends["hangs"]["status"] is None
    assert (ends["next"]["status"], ends["next"]["cut"]) == (0, False)
    child = int(path.with_suffix(".hangs.log").read_text(encoding="utf-8"))
    time.sleep(0.1)
    status = Path(f"/proc/{child}/status")
    assert not status.exists() or "Z (zombie)" in status.read_text(encoding="utf-8")
    assert path.with_suffix(".next.log").read_text(encoding="utf-8") == "hello\n"
    found = gpu_summary.findings([read(path)])
    assert [str(f) for f in found] == [f"not run: hangs: stopped after {ends['hangs']['seconds']:.0f} s"]


def test_what_a_stage_leaves_goes_to_the_next_and_none_goes_beyond_the_command(tmp_path):
    _, ends = conducted(tmp_path, stage("a", 10, ""), stage("b", 5, ""), stage("c", 50, ""), seconds=20)
    assert 12 < ends["b"]["limit"] <= 15 and 15 < ends["c"]["limit"] <= 20
    _, ends = conducted(tmp_path / "second", stage("a", 10, ""), seconds=0.5)
    assert ends["a"]["cut"] and ends["a"]["seconds"] == 0


def test_a_stage_that_breaks_is_a_failure_and_the_others_are_run(tmp_path):
    path, ends = conducted(tmp_path, stage("breaks", 9, "import os; os.abort()"), stage("next", 9, ""))
    assert ends["breaks"]["status"] == -signal.SIGABRT and ends["next"]["status"] == 0
    found = gpu_summary.findings([read(path)])
    assert [f.text for f in found] == ["breaks: ended with status -6; its log says why"]
    assert gpu_summary.status_of(found) == 1


@pytest.mark.quick
def test_the_commands_fit_their_times_and_the_machine_s_limits():
    for number, stages in commands().items():
        names = [s.name for s in stages]
        assert names[0] == "install" and len(set(names)) == len(names)
        assert sum(s.seconds for s in stages if s.name != "install") + 25 <= gpu_run.TOTAL[number]
        # a file of lines and a log each: at most eight files travel back
        assert len(stages) + 1 <= 8
    assert sum(gpu_run.TOTAL.values()) <= 9 * 60
    text = gpu_run.dry_run()
    assert all(f"  {s.name}" in text for stages in commands().values() for s in stages)


@pytest.mark.quick
def test_only_stages_that_can_be_divided_are_told_what_earlier_runs_have_done(tmp_path):
    stages = [s for number in (1, 2) for s in commands()[number]]
    told = {s.name for s in stages if "--left" in s.without(tmp_path).arguments}
    assert told == {"matrix", "ops", "steps", "rest"}


@pytest.mark.quick
def test_make_has_a_word_for_each_part(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    words = ["gpu", "bench-gpu", "gpu-wheels", "gpu-report", "GPU=--out x", "DIR=y", "PYTHON=py"]
    done = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True)
    for line in (
        "py -m tests.gpu_run 1 --out x",
        "py -m tests.gpu_run 2 --out x",
        "-m benchmarks.gpu_report y",
        "liger-kernel cut-cross-entropy",
    ):
        assert line in done.stdout, done.stderr
    assert str(WHEELS.relative_to(ROOT)) in done.stdout


@pytest.mark.slow
def test_without_a_gpu_it_says_so(tmp_path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("about machines without a GPU")
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu_run", "1", "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "no CUDA GPU" in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.quick
def test_what_it_is_asked_without_a_device_it_answers_without_torch():
    blocked = "import sys; sys.modules['torch'] = None; from tests.gpu_run import main; sys.exit(main(sys.argv[1:]))"
    for option in ("--dry-run", "--list-tests"):
        done = subprocess.run([sys.executable, "-c", blocked, option], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout, done.stderr


# ---- what the lines amount to ------------------------------------------------------------------------------------


def run_of(*lines, stages=("matrix",), status=0, cut=False):
    begin = {"kind": "begin", "stage": "", "time": 0.0, "command": 1, "stages": dict.fromkeys(stages, 9.0)}
    end = {
        "kind": "stage",
        "stage": stages[0],
        "time": 9.0,
        "state": "ended",
        "status": status,
        "cut": cut,
        "seconds": 9.0,
        "limit": 9.0,
    }
    return [begin, *({"stage": stages[0], "time": 1.0 + i, **line} for i, line in enumerate(lines)), end]


def outcome(name, kind="passed", why="", **more):
    return {"kind": "test", "name": name, "outcome": kind, "why": why, "seconds": 0.1, **more}


def texts(*runs):
    return [str(finding) for finding in gpu_summary.findings(runs)]


@pytest.mark.quick
def test_failures_and_nameless_skips_are_failures():
    lines = [
        outcome("a"),
        outcome("b", "failed", "x\nAssertionError: no"),
        outcome("c", "skipped", "slow"),
        outcome("d", "skipped", "only the interpreter gets this wrong"),
    ]
    run = run_of({"kind": "collected", "tests": 4}, *lines, status=1)
    assert texts(run) == ["FAILED: matrix: b: AssertionError: no", "FAILED: matrix: 1 tests skipped: slow"]
    found = gpu_summary.correctness([run])
    assert found["tests"] == {"matrix": {"failed": 1, "passed": 1, "skipped": 2}} and len(found["complaints"]) == 2


@pytest.mark.quick
def test_a_test_that_passes_in_a_later_run_counts_as_that():
    first = run_of(outcome("a", "failed", "no"), status=1)
    second = run_of(outcome("a", time=50.0))
    assert texts(first) and not texts(first, second) and not texts(second, first)


@pytest.mark.quick
def test_two_parts_make_a_whole():
    collected = {"kind": "collected", "tests": 2}
    first, second = run_of(collected, outcome("a"), cut=True, status=None), run_of(collected, outcome("b"), cut=True)
    assert texts(first) == ["not run: matrix: stopped after 9 s; 1 of 2 tests"]
    assert texts(first, second) == []
    assert texts(run_of(collected, outcome("a"))) == ["not run: matrix: 1 of 2 tests gave a result"]


@pytest.mark.quick
def test_a_run_whose_tests_could_not_be_collected_is_no_pass():
    assert texts(run_of(status=2)) == ["FAILED: matrix: ended with status 2; its log says why"]
    assert texts(run_of(status=1)) == ["FAILED: matrix: ended with status 1; its log says why"]


@pytest.mark.quick
def test_memcheck_that_refuses_a_device_is_noted_and_its_tests_say_nothing():
    refused = {"kind": "note", "sanitizer": {"unavailable": "compute-sanitizer refuses this device"}}
    run = run_of(
        {"kind": "collected", "tests": 9}, outcome("a", "failed", "CUDA error 999"), refused, stages=("sanitizer",)
    )
    assert texts(run) == [] and "refuses this device" in gpu_summary.table([run])
    assert "unavailable" in gpu_summary.correctness([run])["sanitizer"]


@pytest.mark.quick
def test_cases_that_failed_were_left_out_or_cut_are_told_apart():
    kinds = {"milliseconds": {"ours": 1}}, {"error": "boom"}, {"skipped": "no time"}, {"cut": "no end within 3 s"}
    rows = [{"op": "o", "name": name, **kind} for name, kind in zip("abcd", kinds, strict=True)]
    run = run_of(*({"kind": "case", "row": row} for row in rows), stages=("ops",), status=1)
    assert texts(run) == ["FAILED: o: b: boom", "not run: o: c: no time", "not run: o: d: no end within 3 s"]
    again = run_of(
        {"kind": "case", "row": {"op": "o", "name": "c", "milliseconds": {"ours": 2}}, "time": 99.0},
        {"kind": "case", "row": {"op": "o", "name": "a", "skipped": "no time"}, "time": 99.5},
        stages=("ops",),
    )
    merged = {row["name"]: row for row in gpu_summary.cases([run, again])}
    assert "milliseconds" in merged["c"] and "milliseconds" in merged["a"]
    assert json.dumps(merged)
