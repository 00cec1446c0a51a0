"""At a model's size: a limit is one, the checkpoint is one of the hub, the pages say what was measured."""

import json
import sys

import pytest
import torch
from transformers import OlmoeConfig

from benchmarks import checkpoints, limited, plots, size, size_table
from benchmarks.size import MIB, SIZES, Stage, Work
from moe_unlearn.data import train_tokenizer
from moe_unlearn.model.loading import load_model

TAKE = "import sys, time; taken = bytearray({}) ; time.sleep(0.2); sys.exit({})"


def take(count, limit, folder, status=0):
    return limited.run([sys.executable, "-c", TAKE.format(count, status)], limit, folder / "log")


def test_a_process_that_exceeds_its_limit_is_killed_and_its_peak_is_known(tmp_path):
    within = take(64 * MIB, 1 << 40, tmp_path, status=3)
    assert within.status == 3 and 64 * MIB <= within.anonymous <= within.peak
    beyond = take(512 * MIB, 256 * MIB, tmp_path)
    assert beyond.status is None and beyond.peak > 256 * MIB


def test_a_process_that_is_gone_has_nothing():
    assert limited.resident("self")["VmRSS"] > MIB and limited.resident(2**30) == {}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return Work(tmp_path_factory.mktemp("size"), SIZES["toy"])


def test_the_checkpoint_is_in_the_hub_s_form_and_loads_whole(work, tmp_path):
    model, _ = load_model(work.model)
    assert model.dtype == torch.bfloat16 and sum(p.nbytes for p in model.parameters()) == work.weights
    index = json.loads((work.model / checkpoints.INDEX).read_text(encoding="utf-8"))
    assert "model.layers.1.mlp.experts.7.gate_proj.weight" in index["weight_map"]
    assert len(set(index["weight_map"].values())) > 1 and index["metadata"]["total_size"] == work.weights
    assert (model.model.norm.weight == 1).all() and model.lm_head.weight.float().std() > 0.01
    tokenizer = train_tokenizer(["a text"], 270)
    checkpoints.write(tmp_path, OlmoeConfig(**work.size.config), tokenizer)
    again, _ = load_model(tmp_path)
    assert all(p.equal(q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_a_stage_is_measured_under_what_is_planned_for_it(work, monkeypatch):
    """One verb; all of them take minutes, and are marked nightly."""
    planned = 300 * MIB  # the libraries of a model come on top of those of `env`
    monkeypatch.setattr(Work, "budget", planned)
    rows = {row["stage"]: row for row in size.measure(work, ["stats", "apply"])}
    assert rows["apply"]["skipped"].startswith("experts/delta.safetensors is missing")
    found = rows["stats"]
    assert found["hit"] and found["limit"] == round(rows["libraries"]["peak"] + 1.15 * planned)
    assert 0 < found["anonymous"] <= found["peak"] <= found["limit"]
    assert (work.folder / "stats.json").is_file()


def test_the_plan_of_a_run_is_made_from_the_config_alone(work):
    run, whole = (stage for stage in work.stages() if stage.name.startswith("run: "))
    (work.model / "model.safetensors.index.json").rename(work.folder / "aside")
    try:
        assert work.weights < run.planned() < 8 * work.weights  # activations, as much as all weights
        assert whole.planned() > run.planned()  # the moments of all weights, one byte each
    finally:
        (work.folder / "aside").rename(work.model / "model.safetensors.index.json")


@pytest.mark.nightly
def test_a_verb_that_fails_is_no_measurement(work, monkeypatch):
    failing = Stage("bad", ["stats", "--model", "nowhere"], lambda: 1 << 30, "a plan")
    monkeypatch.setattr(Work, "stages", lambda self: [failing])
    with pytest.raises(RuntimeError, match="bad ended with status 2"):
        [*size.measure(work)]


@pytest.mark.nightly
def test_every_stage_ends_before_it_would_be_killed(tmp_path):
    """On a small checkpoint what does not grow with the weights weighs more than the 15 % that are allowed."""
    out = tmp_path / "record" / "size.json"
    assert size.main(["--size", "small", "--folder", str(tmp_path / "work"), "--out", str(out)]) in (0, 1)
    _, *rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["stage"] for row in rows] == ["stats", "run: experts", "eval", "apply", "mask", "run: all in int8"]
    assert all(row["peak"] <= 1.25 * row["limit"] for row in rows) and rows[3]["hit"]


RUN = {
    "stamp": {"versions": {"torch": "2.13", "transformers": "5.23"}, "commit": "0123456789ab"},
    "processor": "A CPU",
    "config": {"num_hidden_layers": 4},
    "weights": 4_000_000_000,
    "memory": "512MiB",
    "rows": [
        {"stage": "libraries", "peak": 500 * MIB},
        {"stage": "stats", "plan": "weights", "planned": 4096 * MIB, "limit": 5000 * MIB, "peak": 4000 * MIB,
         "anonymous": 3900 * MIB, "seconds": 9.6, "hit": True},
        {"stage": "eval", "plan": "weights", "planned": 4096 * MIB, "limit": 5000 * MIB, "peak": 5001 * MIB,
         "anonymous": 4000 * MIB, "seconds": 20.0, "hit": False, "cut": "stopped"},
        {"stage": "apply", "plan": "weights", "skipped": "the delta is missing"},
    ],
}  # fmt: skip


@pytest.mark.quick
def test_the_pages_say_what_is_planned_and_measured(tmp_path):
    assert size_table.table(tmp_path) == "No run is recorded yet." and size_table.headline(tmp_path) is None
    path = tmp_path / "cpu" / size_table.FILE
    path.parent.mkdir()
    path.write_text(json.dumps(RUN), encoding="utf-8")
    text = size_table.table(tmp_path)
    assert "| stats | weights | 4,096 | 5,000 | 4,000 | 3,900 | 10 | hit |" in text
    assert "| eval | weights | 4,096 | 5,000 | 5,001 | 4,000 | 20 | **missed**, not to its end |" in text
    assert "Not measured: apply: the delta is missing." in text and "commit 012345678:" in text and ".png" not in text
    plots.size(RUN, path.with_name(size_table.FIGURE))
    assert path.with_name(size_table.FIGURE).read_bytes()[:4] == b"\x89PNG"
    assert text in size_table.table(tmp_path) and "(results/cpu/size.png)" in size_table.table(tmp_path)
    what, best, miss = size_table.headline(tmp_path)
    assert "4.0 GB" in what and best[0].startswith("`stats`: 4.19 GB") and miss[0].startswith("`eval`: 5.24 GB")


@pytest.mark.quick
def test_a_stage_that_is_measured_again_takes_its_place_with_its_commit(tmp_path):
    path = tmp_path / "cpu" / size_table.FILE
    path.parent.mkdir()
    former = RUN | {"over": 0.15}
    path.write_text(json.dumps(former), encoding="utf-8")
    again = former["rows"][2] | {"peak": 4800 * MIB, "hit": True}
    del again["cut"]
    rows = [{"stage": "libraries", "peak": 400 * MIB}, again]
    run = former | {"stamp": RUN["stamp"] | {"commit": "abcdef0123456", "uncommitted_changes": True}, "rows": rows}
    merged = size.put_in(path, run)
    assert merged == former | {"rows": [*RUN["rows"][:2], again | {"commit": "abcdef012 with changes"}, RUN["rows"][3]]}
    path.write_text(json.dumps(merged), encoding="utf-8")
    assert "| 4,800 | 4,000 | 20 | hit, commit abcdef012 with changes |" in size_table.table(tmp_path)
    with pytest.raises(ValueError, match="expected a record with the memory 1GiB; got 512MiB"):
        size.put_in(path, run | {"memory": "1GiB"})
