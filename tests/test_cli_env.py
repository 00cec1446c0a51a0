"""The verb `env`, which needs neither a model nor data."""

import io
import json
import sys

import pytest

from moe_unlearn.backend import ENVIRONMENT_VARIABLE
from moe_unlearn.cli import main
from moe_unlearn.errors import UnavailableError


@pytest.mark.quick
def test_env_lists_every_op(capsys):
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    for op in ("route", "expert_mlp", "token_loss", "gram", "masked_update", "weight_score"):
        assert op in text


def test_env_is_json_for_machines(capsys):
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ops"]["gram"]["auto"] in found["ops"]["gram"]["available"] and found["packages"]["torch"]


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
