"""No verb asks the network for anything, unless a model or data of the hub are named."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.command_line import saved
from tests.trust.commands import SIDES, TINY

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")  # without them libraries may ask


def test_only_hub_names_ask_the_network(tmp_path):
    saved(tmp_path)
    model = ("--model", "model", *SIDES)
    commands = [
        ("stats", *model, "--out", "stats.json"),
        ("mask", *model, "--out", "mask.safetensors"),
        ("run", "combined", *model, "--out", "out", *TINY),
        ("eval", "--before", "model", "--model", "out/model", *SIDES, "--out", "eval.json"),
        ("delta", "model", "out/model", "--out", "delta.safetensors"),
        ("report", "out"),
        ("stats", "--model", "nobody/such-a-model-of-the-hub", *SIDES),  # the watch hears what is asked
    ]
    environment = {key: value for key, value in os.environ.items() if key not in OFFLINE}
    child = [sys.executable, "-m", "tests.trust.no_network_child"]
    ended = subprocess.run(
        child,
        input=json.dumps(commands),
        env=environment | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hub")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ended.stdout, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["codes"] == [0] * (len(commands) - 1) + [2], ended.stderr
    assert found["asked"][:-1] == [[]] * (len(commands) - 1)
    assert found["asked"][-1] and all("huggingface.co" in asked for asked in found["asked"][-1])
