"""The verb `env`, which needs neither a model nor data."""

import io
import json
import subprocess
import sys

import pytest

from moe_unlearn.backend import ENVIRONMENT_VARIABLE
from moe_unlearn.cli import main
from moe_unlearn.cli.env import advice
from moe_unlearn.errors import UnavailableError


@pytest.mark.quick
def test_env_lists_every_op():
    """A new interpreter prints the table, since here the ops may have been imported for something else."""
    command = [sys.executable, "-m", "moe_unlearn", "env"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for op in ("route", "expert_mlp", "token_loss", "gram", "masked_update", "weight_score"):
        assert f"\n{op}" in text


def test_env_is_json_for_machines(capsys):
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ops"]["gram"]["auto"] in found["ops"]["gram"]["available"] and found["packages"]["torch"]


@pytest.mark.quick
@pytest.mark.parametrize(
    "cuda,available,library,triton,told",
    [
        (None, False, "", True, ["where there is an NVIDIA GPU: pip install --force-reinstall torch==9.8.7"]),
        ("13.0", False, "", True, ["sees none: nvidia-smi"]),
        (
            "13.0",
            True,
            "not built: no nvcc",
            True,
            ["cuda is not built; with nvcc, in a clone: MOE"],
        ),
        ("13.0", True, "", False, ['triton is missing: pip install "triton>=3.6,<4"']),
        ("13.0", True, "", True, []),
    ],
)
def test_env_says_what_a_gpu_lacks_with_the_command(monkeypatch, cuda, available, library, triton, told):
    monkeypatch.setattr("torch.__version__", "9.8.7+cpu")
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr("torch.cuda.is_available", lambda: available)
    monkeypatch.setattr("moe_unlearn.native.load", lambda name: library)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if triton else None)
    lines = advice()
    assert len(lines) == len(told) and all(part in line for part, line in zip(told, lines, strict=True))


def test_what_the_locale_lacks_is_printed_as_a_question_mark(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr("platform.machine", lambda: "\N{DOWNWARDS ARROW}")
    assert main(["env"]) == 0
    assert terminal.buffer.getvalue().splitlines()[0].endswith(b" on ?")


@pytest.mark.quick
def test_a_forced_implementation_that_is_missing_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cuda")
    assert main(["env"]) == 2
    assert (
        "error: 'expert_mlp' has no implementation cuda for device 'cpu'; available: cpu, ref"
        in capsys.readouterr().err
    )
    with pytest.raises(UnavailableError):
        main(["env", "--traceback"])
