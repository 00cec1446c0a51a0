"""A sweep: its grid, one failing run is a row, it goes on where it was stopped, and its tables."""

import csv
import json
import sys
from types import SimpleNamespace

import pytest

from moe_unlearn.cli import main
from moe_unlearn.runs import sweep
from moe_unlearn.runs.sweep import FAILED, FINISHED, Row, Sweep, grid_of, rows_of
from tests.support.command_line import arguments, saved

# of a run: writes its summary, prints its error as a run does, or is killed
CHILD = """
import json, os, signal, sys
folder, rate, seed = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
if rate == 3: os.kill(os.getpid(), signal.SIGKILL)
if rate == 2:
    print("moe-unlearn run: error: the rate | is two", file=sys.stderr); sys.exit(2)
os.makedirs(folder, exist_ok=True)
row = {"nll_f": rate + seed, "nll_r": 1.25, "verbmem_f": None}
json.dump({"target": {"nll_f": 1.0}, "npo": row}, open(f"{folder}/summary.json", "w"))
"""


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Make a sweep of rates and two seeds whose runs are of `CHILD`; `begun` are those that were started."""
    monkeypatch.setattr(sweep.folders, "finished", lambda folder, steps, wanted: (folder / "summary.json").exists())

    def make(*rates, of=("npo",)):
        def command(row, folder):
            make.begun.append(row.name)
            return [sys.executable, "-c", CHILD, str(folder), row.settings["optimizer.lr"], str(row.seed)]

        def recipe_of(overrides):
            if "optimizer.lr=-1" in overrides:
                raise ValueError("optimizer.lr must be at least 0; got -1")
            return SimpleNamespace(name="npo", steps=1)

        make.begun = []
        return Sweep(tmp_path, rows_of({"optimizer.lr": rates}, (0, 1)), {"recipe": [*of]}, recipe_of, command)

    return make


@pytest.mark.quick
def test_a_grid_has_every_combination_and_every_seed():
    grid = grid_of(["optimizer.lr=1e-5,3e-5", "forget=npo,simnpo", "optimizer.betas=[0.9,0.99],[0.8,0.9]"])
    assert grid["forget.objective"] == ["npo", "simnpo"] and grid["optimizer.betas"] == ["[0.9,0.99]", "[0.8,0.9]"]
    rows = rows_of(grid, range(3))
    assert len(rows) == len({row.name for row in rows}) == 24
    assert rows[0].overrides[:2] == ["optimizer.lr=1e-5", "forget.objective=npo"] and rows[2].seed == 2
    assert Row({"optimizer.lr": "1e-5"}, 0).name == "optimizer.lr=1e-5,seed=0"
    assert Row({"data.model": "a/b"}, 0).name != Row({"data.model": "a_b"}, 0).name and "/" not in rows[0].name


@pytest.mark.quick
@pytest.mark.parametrize(
    "texts,message",
    [
        (["optimizer.lr"], "--grid takes KEY=VALUE,VALUE"),
        (["optimizer.lr=1,,2"], "--grid takes KEY=VALUE,VALUE"),
        (["seed=1,2"], "takes no seed: --seeds N"),
        (["steps=1,1"], "has steps twice, or a value of it"),
        (["steps=1", "steps=2"], "has steps twice, or a value of it"),
    ],
)
def test_what_is_no_grid_is_refused(texts, message):
    with pytest.raises(ValueError, match=message):
        grid_of(texts)


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_run_that_fails_is_a_row_and_the_others_go_on(made, tmp_path, jobs, capsys):
    runs = made("1", "2", "3", "-1")
    runs.run(jobs, forms=("csv", "latex"))
    assert [row.state for row in runs.rows] == [FINISHED] * 2 + [FAILED] * 6
    errors = [row.error for row in runs.rows[2::2]]
    assert errors[0] == "the rate | is two (exit code 2)" and errors[1] == "(ended by signal 9)"
    assert errors[2] == "optimizer.lr must be at least 0; got -1" and len(made.begun) == 6
    head, (before, first, second, *_) = runs.table()
    assert head == ["optimizer.lr", "NLL forget →R", "NLL retain ↓", "runs", "failed"]
    assert before[:2] == ["target (to unlearn)", "1.00"] and first == ["1", "1.50 ± 0.71", "1.25 ± 0.00", "2/2", ""]
    assert second[:4] == ["2", "–", "–", "0/2"] and second[4].startswith(
        "seed 0: the rate | is two (exit code 2); seed 1"
    )
    page = (tmp_path / "sweep.md").read_text(encoding="utf-8")
    assert "8 runs: 2 finished, 6 failed" in page and "the rate \\| is two" in page
    numbers = [*csv.DictReader((tmp_path / "sweep.csv").open(encoding="utf-8", newline=""))]
    assert numbers[1]["nll_f"] == "2.0" and numbers[1]["verbmem_f"] == "" and numbers[2]["error"] == errors[0]
    assert r"1.50 $\pm$ 0.71 & 1.25" in (tmp_path / "sweep.tex").read_text(encoding="utf-8")
    assert "3 of 8" in capsys.readouterr().err


def test_a_sweep_goes_on_where_it_was_stopped(made, tmp_path):
    made("1", "2").run(1)
    again = made("1", "2", "4")
    again.run(1)
    assert made.begun == [f"optimizer.lr={rate},seed={seed}" for rate in (2, 4) for seed in (0, 1)]
    kept = json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))["rows"]
    assert [row["state"] for row in kept] == [FINISHED, FINISHED, FAILED, FAILED, FINISHED, FINISHED]
    with pytest.raises(ValueError, match=r"has a sweep of something else: recipe \(was \['npo'\], is \['ga'\]\)"):
        made("1", of=("ga",))
    with pytest.raises(ValueError, match="optimizer.lr must be at least 0"):
        made("-1")


def test_a_recipe_whose_file_was_changed_is_another_sweep(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep.Sweep, "run", lambda self, jobs, forms: self.write(forms))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("extends: npo\nsteps: 2\n", encoding="utf-8")
    given = ["sweep", str(recipe), "--grid", "optimizer.lr=1,2", "--out", str(tmp_path / "out")]
    assert main(given) == 0 and main(given) == 0
    recipe.write_text("extends: npo\nsteps: 2\nforget: {beta: 0.2}\n", encoding="utf-8")
    assert main(given) == 2
    assert "a sweep of something else: values.forget.beta (was 0.1, is 0.2); give" in capsys.readouterr().err


@pytest.mark.nightly
def test_the_verb_makes_real_runs_of_which_one_fails(tmp_path, capsys):
    """Texts have no question that idk_dpo could refuse."""
    saved(tmp_path)
    given = ["sweep", "npo", "--grid", "forget=npo,idk_dpo", "--out", str(tmp_path / "out"), *arguments(tmp_path)]
    assert main([*given, "--set", "steps=2", "data.max_length=48", "--csv"]) == 1
    told = capsys.readouterr().out
    assert "no prompt to refuse" in told and "1/1" in told and str(tmp_path / "out" / "sweep.csv") in told
    assert (tmp_path / "out" / "forget.objective=npo,seed=0" / "model" / "config.json").is_file()
    finished = (tmp_path / "out" / "forget.objective=npo,seed=0" / "summary.json").stat().st_mtime_ns
    assert main([*given, "--set", "steps=2", "data.max_length=48", "--jobs", "2"]) == 1
    assert (tmp_path / "out" / "forget.objective=npo,seed=0" / "summary.json").stat().st_mtime_ns == finished
