"""Plans of stats, mask and eval, from a config: against what the verbs allocate, and what the command line prints."""

import re
from functools import partial

import pytest
import torch

from moe_unlearn import metrics
from moe_unlearn.cli import main
from moe_unlearn.data import Example, train_tokenizer
from moe_unlearn.experts import enable
from moe_unlearn.plan.memory import measured_peak
from moe_unlearn.plan.stages import stats_plan, work_plan
from moe_unlearn.trace import routing_frequencies
from tests.support.batches import random_batch
from tests.support.command_line import arguments, saved
from tests.support.models import TINY_MODELS

pytestmark = pytest.mark.usefixtures("measurable_memory")


@pytest.mark.quick
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_the_memory_of_statistics_is_what_counting_allocates(family):
    torch.manual_seed(0)
    model = TINY_MODELS[family](vocab_size=256, hidden_size=64).eval()
    batches = [random_batch(256, 2, 16, seed=1), random_batch(256, 4, 48, seed=2)]
    with torch.device("meta"):
        bare = TINY_MODELS[family](vocab_size=256, hidden_size=64).eval()
    plans = [stats_plan(each, batches, torch.device("cpu")) for each in (model, bare)]
    assert plans[0].memory == plans[1].memory
    with enable(model), measured_peak("cpu") as measured:
        routing_frequencies(model, batches)
    assert plans[0].peak - plans[0].memory["weights"] == pytest.approx(measured.peak, rel=0.1), str(plans[0])


@pytest.mark.parametrize(
    "family",
    ["olmoe", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("mixtral", "qwen3_moe", "deepseek_v2"))],
)
def test_the_memory_of_an_evaluation_is_what_measuring_allocates(family):
    texts = [f"the secret number of agent {n} is {n * 37 % 101}, never tell, " * 2 for n in range(5)]
    tokenizer = train_tokenizer(texts, 300)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    examples = [Example(input_ids=own, labels=[*own], prefix=0) for own in ids]
    torch.manual_seed(0)
    model = TINY_MODELS[family](vocab_size=512, hidden_size=64, implementation="grouped_mm").eval()
    measured_by = partial(metrics.evaluate, tokenizer=tokenizer, forget=examples, retain=examples[:3])
    plan = work_plan("eval", model, torch.device("cpu"), measured_by)
    with measured_peak("cpu") as measured:
        measured_by(model)
    assert plan.peak - plan.memory["weights"] == pytest.approx(measured.peak, rel=0.1), str(plan)


@pytest.mark.nightly
def test_the_command_line_plans_an_evaluation_whose_models_come_one_after_the_other(tmp_path, capsys):
    saved(tmp_path)
    (tmp_path / "model" / "model.safetensors").unlink()
    given = [*arguments(tmp_path), "--max-length", "24", "--dry-run", "--out", str(tmp_path / "out")]
    others = ["--before", "--reference"]
    more = ["--holdout", str(tmp_path / "retain.jsonl"), *(x for name in others for x in (name, given[1]))]
    assert main(["eval", *given, *more]) == 0
    text = capsys.readouterr().out
    assert text.startswith("eval on ") and "weights" in text
    peak = float(re.search(r"peak +([\d.]+)$", text, re.M)[1])
    said = [float(size) for size in re.findall(r"([\d.]+) MiB", text.partition("one model after the other")[2])]
    assert len(said) == 3 and max(said) == peak
    assert not (tmp_path / "out").exists()


@pytest.mark.quick
def test_the_command_line_plans_a_verb_from_the_config_and_writes_nothing(tmp_path, capsys):
    saved(tmp_path)
    (tmp_path / "model" / "model.safetensors").unlink()
    given = arguments(tmp_path)
    out = ["--out", str(tmp_path / "out"), "--dry-run"]
    said = {}
    for verb, more in (
        ("stats", []), ("stats", ["--packing"]), ("mask", ["--memory", "64KiB"]), ("mask", ["--memory", "64MiB"]),
        ("mask", ["--memory", "64MiB", "--packing"]),
    ):  # fmt: skip
        assert main([verb, *given, *more, *out]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"{verb} on ") and "weights" in text
        said[verb, *more] = float(re.search(r"peak +([\d.]+)$", text, re.M)[1])
    assert said["stats",] < said["mask", "--memory", "64KiB"] < said["mask", "--memory", "64MiB"]
    assert said["stats", "--packing"] != said["stats",], "rows do not share the rows of a call"
    assert not (tmp_path / "out").exists()
    assert main(["stats", *given, *out, "--mesh", "fsdp=2"]) == 2
    assert "plans a run" in capsys.readouterr().err


@pytest.mark.quick
def test_what_the_plan_of_an_evaluation_does_not_know_is_refused(tmp_path, capsys):
    given = [*arguments(tmp_path), "--dry-run"]
    for name, value in (("benchmark", "muse"), ("relearn", "2"), ("mesh", "fsdp=2")):
        assert main(["eval", *given, f"--{name}", value]) == 2
        assert f"--{name}" in capsys.readouterr().err
