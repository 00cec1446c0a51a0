"""Lines about steps: to read on stderr, for machines on stdout, every so many steps and at both ends."""

import json
import math
from types import SimpleNamespace

import pytest

from moe_unlearn.progress import Form, shown
from moe_unlearn.trainer.lines import StepLines

pytestmark = pytest.mark.quick


def train(form, steps=5):
    """Let a Trainer of `steps` steps log each of them."""
    state, lines = SimpleNamespace(global_step=0, max_steps=steps), StepLines()
    with shown(form):
        lines.on_train_begin(None, state, None)
        for state.global_step in range(1, steps + 1):
            lines.on_step_end(None, state, None)
            logs = {"loss": 1.0, "forget_loss": 1 / state.global_step, "retain_loss": math.nan, "learning_rate": 1e-5}
            lines.on_log(None, state, None, logs)
        lines.on_log(None, state, None, {"train_runtime": 1.0})
        lines.on_train_end(None, state, None)


def test_lines_to_read(capsys):
    train(Form(bars=True, every=2))
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert not out and [line.split()[1] for line in lines] == ["1/5", "2/5", "4/5", "5/5"]
    assert lines[0].startswith("step 1/5  forget 1  retain nan  lr 1e-05  about ")


def test_lines_for_machines(capsys):
    train(Form(every=1, json_lines=True))
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    assert not err and [line["step"] for line in found] == [1, 2, 3, 4, 5]
    assert found[1] | {"step": 0} == {
        "step": 0, "steps": 5, "loss": 1.0, "forget_loss": 0.5, "retain_loss": None, "learning_rate": 1e-5
    }  # fmt: skip


@pytest.mark.parametrize("form", [Form(), Form(bars=True), Form(every=1)])
def test_nothing_where_nothing_is_asked_for(form, capsys):
    train(form)
    assert capsys.readouterr() == ("", "")
