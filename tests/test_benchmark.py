"""The embedded experiment from end to end, at its test size."""

import json
import os

import pytest

from moe_unlearn import benchmark
from moe_unlearn.cli import main

RUNS = ("trace", "combined")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MOE_UNLEARN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def without_seconds(path):
    seeds = json.loads((path / "seeds.json").read_text())
    for runs in seeds["results"].values():
        for values in runs.values():
            assert values.pop("seconds") > 0
    return seeds


def test_the_runs_side_by_side_are_those_one_after_the_other(tmp_path):
    folders = [tmp_path / "two", tmp_path / "one"]
    for processes, folder in zip((2, 1), folders, strict=True):
        benchmark.demo("builtin:pydoc", [0], folder, RUNS, size="test", processes=processes)
    first, second = (without_seconds(folder) for folder in folders)
    assert first == second
    assert list(first["results"]) == ["0"]
    for results in first["results"].values():
        assert list(results) == ["target", "retrain", *RUNS]
        assert results["retrain"]["privleak"] == 0
        assert results["target"]["verbmem_f"] > 0.8 > results["retrain"]["verbmem_f"] + 0.2
        # the demo's settings are not this size's, but the direction is that of forgetting
        assert results["combined"]["nll_f"] > results["target"]["nll_f"] + 0.1
    trajectory = json.loads((folders[0] / "trajectory.json").read_text())
    assert list(trajectory) == list(RUNS) and all(points[0]["step"] == 0 for points in trajectory.values())
    assert (folders[0] / "report.md").is_file() and (folders[0] / "figures" / "trajectories.png").is_file()


def test_an_error_in_a_process_is_told_and_nothing_is_written(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["demo", "--corpus", "builtin:nothing", "--out", str(out)]) != 0
    assert "builtin:nothing" in capsys.readouterr().err
    assert not os.path.exists(out)
