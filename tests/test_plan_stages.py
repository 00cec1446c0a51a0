"""Plans of stats and mask, from a config: against what the verbs allocate, and what the command line prints."""

import re

import pytest
import torch

from moe_unlearn.cli import main
from moe_unlearn.experts import enable
from moe_unlearn.plan.memory import measured_peak
from moe_unlearn.plan.stages import stats_plan
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
