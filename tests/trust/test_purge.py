"""What a run leaves of the forgotten text is removed by `purge`, and told; the model and numbers stay."""

import stat
from fnmatch import fnmatch

import pytest
import torch
from safetensors.torch import save_file

from moe_unlearn.cli import main, paths, purge
from moe_unlearn.files import UNFINISHED, make_folder, write_json
from moe_unlearn.masks import WeightMask
from moe_unlearn.prepare.preparation import CACHES
from moe_unlearn.runs import report
from moe_unlearn.runs.sweep import Row

pytestmark = pytest.mark.quick
SECRET = "the secret number of agent 7"
KEPT = ["model/a.safetensors", "recipe.yaml", "batch.json", "summary.json", "figures/pareto.svg", "TOFU_SUMMARY.json"]
KEPT += ["audit.json", "audit/AUDIT.md"]
GONE = [
    "cache/ref_logprobs-0/0.safetensors",
    "checkpoints/checkpoint-3/model.safetensors",
    "data.json",
    "sampled.json",
    "samples.json",
    "delta.safetensors.index.json",
    "TOFU_EVAL.json",
    "audit/result-3.json",
    "mask.groups/wagle-0/begun",
    f"{UNFINISHED}0/half",
]


@pytest.fixture
def folder(tmp_path):
    for name in [*KEPT, *GONE]:
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SECRET, encoding="utf-8")
    words = {"a": torch.ones(2, 1, dtype=torch.int32)}
    WeightMask({"a": (2, 3)}, words, keep=0.5).save(tmp_path / "run" / "mask.safetensors")
    save_file(words, tmp_path / "run" / "delta-00001-of-00002.safetensors", {"format": "moe-unlearn delta 1"})
    save_file(words, tmp_path / "run" / "other.safetensors")
    return tmp_path / "run"


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def test_what_is_removed_is_told_and_the_rest_stays(folder, tmp_path, capsys):
    for name in ("ref_logprobs-1/0.safetensors", "examples-2", "result-3.json", "mine.txt"):
        (tmp_path / "shared" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "shared" / name).write_text(SECRET, encoding="utf-8")
    outside = tmp_path / "forget.jsonl"
    outside.write_text(SECRET, encoding="utf-8")
    (folder / "cache" / "link").symlink_to(outside)
    (folder / "data.json").unlink()
    (folder / "data.json").symlink_to(outside)
    assert main(["purge", str(folder), "--cache", str(tmp_path / "shared")]) == 0
    told = capsys.readouterr().out
    gone = {name if name.startswith("audit/") else name.partition("/")[0] for name in GONE}
    for name in gone | {"mask.safetensors", "delta-00001-of-00002.safetensors"}:
        assert f"removed {folder / name}: " in told
    assert (
        f"{folder / 'cache'}: references: values of the original model on each row, and results of an audit (2 files, "
        in told
    )
    assert f"left {folder / 'other.safetensors'}, which no run writes: look at it yourself" in told
    assert files(folder) == sorted([*KEPT, "other.safetensors"])
    assert files(tmp_path / "shared") == ["mine.txt"] and outside.exists()
    assert main(["purge", str(folder)]) == 0 and "0 removed" in capsys.readouterr().out


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "own").mkdir()
    for name in ("cache", "model", "checkpoints"):
        (tmp_path / "own" / name).mkdir()
    (tmp_path / "own" / "summary.json").touch()
    for given in ("own", "absent"):
        assert main(["purge", str(tmp_path / given)]) == 2
        assert "expected the folder of a run, a sweep, an evaluation or an audit" in capsys.readouterr().err
    assert len([*(tmp_path / "own").iterdir()]) == 4


def test_all_runs_of_a_sweep_are_purged(tmp_path, capsys):
    """One of them failed before it wrote anything but its log; a file of the user's stays."""
    rows = [Row({"optimizer.lr": rate}, 0) for rate in ("1e-5", "1")]
    finished = tmp_path / rows[0].name
    (finished / "model").mkdir(parents=True)
    write_json(tmp_path / "sweep.json", {"rows": [{"settings": row.settings, "seed": row.seed} for row in rows]})
    content = report.Content(
        {"npo": {"nll_f": 3.0}}, samples={"forget": [dict.fromkeys(("prompt", "truth", "before", "after"), SECRET)]}
    )
    report.save(finished, content)
    report.write(finished, content)
    for path in (finished / "data.json", finished / "recipe.yaml", tmp_path / "sweep.md"):
        path.touch()
    for name in (f"{rows[0].name}.log", f"{rows[1].name}.log", "own.log"):
        (tmp_path / name).write_text(SECRET, encoding="utf-8")
    (tmp_path / "cache").mkdir()
    assert main(["purge", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert f"removed {tmp_path / rows[1].name}.log: what a run has printed" in told
    assert f"left {tmp_path / 'own.log'}, which no run writes" in told
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"sweep.json", "sweep.md", "own.log", rows[0].name} and (finished / "model").is_dir()
    assert not {"data.json", "samples.json"} & {path.name for path in finished.iterdir()}
    assert SECRET not in (finished / "report.html").read_text(encoding="utf-8")
    (tmp_path / "sweep.json").write_text("[]", encoding="utf-8")
    assert main(["purge", str(tmp_path)]) == 2 and "sweep.json is not what a sweep writes" in capsys.readouterr().err


def test_all_that_a_run_writes_is_known():
    """A name that is new in a run's folder has to be said to go or to stay."""
    made = {name for verb in ("run", "demo", "audit", "sweep") for name in paths.VERBS[verb].inside} | {"cache"}
    known = (*purge.KEPT, *purge.REMOVED)
    unknown = {name for name in made if not any(fnmatch(name, pattern) for pattern in known)}
    assert unknown == {"delta.safetensors"}  # which its format tells
    assert {f"{kind}-*" for kind in CACHES} <= purge.REMOVED.keys()


def test_new_folders_are_private(tmp_path):
    made = make_folder(tmp_path / "parent" / "cache")
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    made.chmod(0o750)
    assert stat.S_IMODE(make_folder(made).stat().st_mode) == 0o750  # as its owner wants it


def test_the_report_is_written_again_without_the_texts(tmp_path, capsys):
    """Where its numbers cannot be read, the pages go: they may hold texts."""
    sample = {"prompt": SECRET, "truth": SECRET, "before": SECRET, "after": "nothing"}
    content = report.Content({"npo": {"nll_f": 3.0}}, samples={"forget": [sample]})
    report.save(tmp_path, content)
    report.write(tmp_path, content)
    for page in report.PAGES:
        assert SECRET in (tmp_path / page).read_text(encoding="utf-8")
    assert main(["purge", str(tmp_path)]) == 0
    assert not (tmp_path / "samples.json").exists()
    for page in report.PAGES:
        text = (tmp_path / page).read_text(encoding="utf-8")
        assert SECRET not in text and "3.0" in text
    (tmp_path / "summary.json").write_text("{", encoding="utf-8")
    capsys.readouterr()
    assert main(["purge", str(tmp_path)]) == 0
    assert f"removed {tmp_path / 'report.html'}: it may hold texts" in capsys.readouterr().out
    assert not any((tmp_path / page).exists() for page in report.PAGES)
