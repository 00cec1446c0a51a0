"""A run's folder: a finished run stays, a resume is of the same run, one run writes at a time, nothing is lost."""

import itertools
import json
import multiprocessing
import os
import re
import shutil
import socket
import time
import types

import pytest

from moe_unlearn.cli import main
from moe_unlearn.model.loading import load_model
from moe_unlearn.runs import clock, folder
from moe_unlearn.runs.code import code, commit
from moe_unlearn.runs.lock import locked
from moe_unlearn.step import UnlearnStep
from tests.support.command_line import arguments, saved

STEPS = 4  # of three an epoch: the run ends within one


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    saved(root)
    return root


def run(inputs, out, *more, options=(), **paths):
    quick = [f"steps={STEPS}", "batch_size=4", "optimizer.lr=1e-2", "data.max_length=48"]
    given = arguments(inputs, **paths)
    return main(["run", "graddiff", *given, "--out", str(out), "--no-eval", *options, "--set", *quick, *more])


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    assert run(inputs, out) == 0
    return out


@pytest.fixture
def out(finished, tmp_path):
    """A copy of the folder of a finished run."""
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def untouched(folder):
    """Return the bytes and the time of each file, and the time of each folder but the top one, where the lock stood."""
    return contents(folder), {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_finished_run_says_so_and_changes_nothing(inputs, out, capsys):
    """A loop that tries again trained on: checkpoint-5, and other weights."""
    before = contents(out)
    assert run(inputs, out, options=["--resume"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{out} has this run, and it is finished: nothing is left to do"]
    assert contents(out) == before
    assert run(inputs, out, f"steps={STEPS - 1}", options=["--resume"]) == 0 and contents(out) == before


def test_a_run_that_was_stopped_before_its_last_save_only_saves(inputs, out, capsys):
    """And one whose model was damaged afterwards writes it again."""
    before = contents(out)
    for lost in ("model", "manifest"):
        shutil.rmtree(out / lost) if lost == "model" else (out / lost).unlink()
    assert run(inputs, out, options=["--resume"]) == 0 and contents(out) == before
    (out / "model" / "model.safetensors").write_bytes(b"short")
    with pytest.warns(UserWarning, match="what the run has written is damaged, and is written again: .*model.saf"):
        assert run(inputs, out, options=["--resume"]) == 0
    assert contents(out) == before


def test_a_run_without_a_whole_checkpoint_says_what_to_do(inputs, out, capsys):
    (out / "manifest").unlink()
    for file in out.glob("checkpoints/*/model.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    before = untouched(out)
    with pytest.warns(UserWarning, match="skipping a broken checkpoint"):
        assert run(inputs, out, options=["--resume"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "none is there that is whole; put one back" in told and "--overwrite" in told
    assert untouched(out) == before


def another_model(inputs, out, monkeypatch):
    model, tokenizer = load_model(inputs / "model")
    model.lm_head.weight.data[0, 0] += 1
    for part in (model, tokenizer):
        part.save_pretrained(out / "other")
    return [], {"model": out / "other"}


def another_document(inputs, out, monkeypatch):
    """Return a retain set of other documents, as long as those before."""
    text = (inputs / "retain.jsonl").read_text(encoding="utf-8")
    (out / "other.jsonl").write_text(text.replace("square", "number"), encoding="utf-8")
    return [], {"retain": out / "other.jsonl"}


def another_code(inputs, out, monkeypatch):
    monkeypatch.setattr("moe_unlearn.runs.folder.code", lambda: "0.1.0, sources 0123")
    monkeypatch.setattr("moe_unlearn.runs.folder.commit", lambda: "4567")
    return [], {}


def other_ranks(inputs, out, monkeypatch):
    """As a launcher of two processes does; what they compute is not reached."""
    facts_of = folder.facts_of
    monkeypatch.setattr(folder, "facts_of", lambda *given: facts_of(*given[:-1], 2))
    return [], {}


OTHERS = {
    "model": (another_model, r"has a run of something else: model \(was \w+, is \w+\);"),
    # rows that are held out are drawn of all
    "retain": (another_document, r"has a run of something else: retain \(was \w+, is \w+\)(, retain_eval \(.*\))?;"),
    "code": (
        another_code,
        r"something else: code \(was 0.1.0, sources \w{16}, is 0.1.0, sources 0123\), commit \(was .*, is 4567\);",
    ),
    "ranks": (other_ranks, r"has a run of something else: ranks \(was 1, is 2\);"),
    "recipe": (lambda *_: (["optimizer.lr=2e-2"], {}), "another recipe: optimizer.lr was 0.01, is 0.02"),
    "settings": (lambda *_: (["data.max_length=47", "data.prompt_tokens=2"], {}), r"something else: forget \("),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_resume_of_something_else_is_refused_naming_it(name, inputs, out, capsys, monkeypatch):
    """A model, or documents of equal length, gave the former run's weights."""
    change, told = OTHERS[name]
    more, paths = change(inputs, out.parent, monkeypatch)
    before = untouched(out)
    assert run(inputs, out, *more, options=["--resume"], **paths) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert re.search(told, line) and "--overwrite" in line
    assert untouched(out) == before


def test_code_is_told_apart_by_its_sources_and_a_clone_by_its_commit(finished, monkeypatch, tmp_path):
    facts = json.loads((finished / "run.json").read_text(encoding="utf-8").partition("\n")[2])
    assert facts["code"] == code() and facts["commit"] == commit()
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "one.py").write_text("a = 1", encoding="utf-8")
    monkeypatch.setattr("moe_unlearn.runs.code._PACKAGE", tmp_path / "package")
    made = [code.__wrapped__()]
    (tmp_path / "package" / "one.py").write_text("a = 2", encoding="utf-8")
    made.append(code.__wrapped__())
    (tmp_path / "package" / "one.py").rename(tmp_path / "package" / "two.py")
    made.append(code.__wrapped__())
    assert len({*made, code()}) == 4
    assert commit() is None  # whatever repository it is installed in


def test_a_used_folder_is_refused_and_begun_anew_on_request(inputs, out, capsys):
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    before = contents(out)
    assert run(inputs, out) == 2 and "--resume goes on with that run, --overwrite removes" in capsys.readouterr().err
    assert contents(out) == before
    # what the new run lacks is gone, and a refused one removes nothing
    assert run(inputs, out, forget="none.jsonl", options=["--overwrite"]) == 2 and contents(out) == before
    assert run(inputs, out, "steps=1", options=["--overwrite"]) == 0
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["checkpoint-1"]
    assert (out / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_a_run_without_a_folder_gets_a_dated_one_of_its_own(inputs, tmp_path, capsys, monkeypatch):
    """All had runs/unlearn, where the second run was refused or overwrote the first."""
    monkeypatch.chdir(tmp_path)
    given = ["run", "graddiff", *arguments(inputs), "--no-eval", "--set", "steps=1", "data.max_length=48"]
    assert main([*given, "name=a b/c"]) == 0
    (first,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-a-b-c-1", first.name) and (first / "model").is_dir()
    assert f"the run's folder is runs/{first.name}" in capsys.readouterr().err
    with folder.dated(tmp_path / "runs", "a b/c") as second, folder.dated(tmp_path / "runs", "a b/c") as third:
        assert [second.name[-8:], third.name[-8:]] == ["-a-b-c-2", "-a-b-c-3"]
        (third / "kept").touch()
    assert main([*given, "data.forget=none.jsonl"]) == 2
    assert {*(tmp_path / "runs").iterdir()} == {first, third}
    for option in ("--resume", "--overwrite"):
        assert main([*given, option]) == 2 and "give it as --out" in capsys.readouterr().err


def test_seconds_add_up_over_resumes(inputs, tmp_path, monkeypatch):
    """They were those of the last process alone; what an interruption undid counts once."""
    given = ["run", "graddiff", *arguments(inputs), "--out", str(tmp_path / "out")]
    settings = ["--set", f"steps={STEPS}", "batch_size=4", "data.max_length=48"]
    monkeypatch.setattr(clock, "time", types.SimpleNamespace(perf_counter=itertools.count(1).__next__))
    finish, made = UnlearnStep.finish, itertools.count(1)

    def interrupted(step):
        if next(made) == 3:
            raise KeyboardInterrupt
        return finish(step)

    with monkeypatch.context() as patch:
        patch.setattr(UnlearnStep, "finish", interrupted)
        assert main([*given, *settings]) == 130
    kept = clock.Clock.of_checkpoint(tmp_path / "out" / "checkpoints" / "checkpoint-2").seconds
    assert kept == 4, "one for the preparation, and one for each look at the clock: begun, saved, saved"
    assert main([*given, "--resume", *settings]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["graddiff"]["seconds"] == kept + 4, "begun, saved, saved, ended"


def test_a_second_run_in_a_folder_is_refused_and_a_killed_one_is_no_first(inputs, tmp_path, capsys):
    """Both ended with exit code 0, and one with the other's files."""
    out = tmp_path / "out"
    with locked(out):
        own = json.loads((out / "lock").read_text(encoding="utf-8"))
        assert own["pid"] == os.getpid() and own["host"] == socket.gethostname()
        assert run(inputs, out) == 2
        assert f"process {os.getpid()} on {own['host']}, since" in capsys.readouterr().err
        assert (out / "lock").is_file()
    assert not out.exists()
    context = multiprocessing.get_context("fork")
    begun, begin = context.Pipe(duplex=False)

    def held():
        with locked(out):
            begin.send(True)
            time.sleep(99)

    other = context.Process(target=held)
    other.start()
    assert begun.poll(60)
    with pytest.raises(BlockingIOError, match=f"process {other.pid} on .* is writing"), locked(out):
        pass
    other.kill()
    other.join()
    with locked(out):
        assert f"was left by process {other.pid}, which has ended; it is replaced" in capsys.readouterr().err
    (out / "lock").write_text(json.dumps(own | {"host": "elsewhere"}), encoding="utf-8")
    with pytest.raises(BlockingIOError, match="on elsewhere, since .* if it is gone, remove"), locked(out):
        pass
    (out / "lock").write_text(json.dumps(own | {"started": "1"}), encoding="utf-8")  # the id of a later process
    with locked(out):
        assert "it is replaced" in capsys.readouterr().err


def test_a_last_update_that_overflows_is_not_saved(inputs, tmp_path, capsys, monkeypatch):
    """No step follows it, in which a loss would have told."""
    finish = UnlearnStep.finish

    def overflowing(step):
        next(iter(step.view().trained))[1].data.view(-1)[-1] = float("nan")
        return finish(step)

    monkeypatch.setattr(UnlearnStep, "finish", overflowing)
    assert run(inputs, tmp_path / "out", "steps=1") == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "trained parameters hold NaN or infinite weights after 1 steps" in told
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.quick
def test_float16_is_refused_with_what_to_do(inputs, tmp_path, capsys):
    assert run(inputs, tmp_path / "out", options=["--dtype", "float16"]) == 2
    assert "is float16" in capsys.readouterr().err and not (tmp_path / "out").exists()
