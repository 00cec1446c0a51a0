"""The `trainer` section of a recipe, conflicts with TrainingArguments, and evaluations by side."""

import copy
import importlib.util
import json
import warnings

import pytest
import torch

from moe_unlearn.cli import main
from moe_unlearn.config import Recipe
from moe_unlearn.data import ForgetRetainDataset
from moe_unlearn.trainer import UnlearnTrainer
from moe_unlearn.trainer.arguments import checked, warn_of_conflicts
from tests.support.command_line import arguments as given
from tests.support.command_line import saved
from tests.support.models import tiny_olmoe
from tests.support.training import VOCAB, arguments, examples


@pytest.mark.quick
def test_a_section_gives_arguments_of_their_types():
    section = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": "1e-1",
        "bf16": True,
        "save_steps": 3,
        "report_to": "none",
    }
    assert checked(section) == section | {"warmup_steps": 0.1}
    assert checked({"eval_strategy": False}) == {"eval_strategy": "no"}, "YAML reads the word no as false"


@pytest.mark.quick
@pytest.mark.parametrize(
    "section,message",
    [
        ({"report_too": "x"}, "unknown recipe key 'trainer.report_too'; did you mean 'report_to'"),
        ({"nothing": 1}, "unknown recipe key 'trainer.nothing'; valid keys are those"),  # like none of them
        ({"save_steps": "often"}, "trainer.save_steps must be float; got 'often'"),
        ({"bf16": 1}, "trainer.bf16 must be bool; got 1"),
        ({"eval_strategy": "step"}, "trainer.eval_strategy must be one of no, steps, epoch; got 'step'"),
        ({"report_to": "tensorbored"}, "trainer.report_to must be none, all, or some of .*tensorboard.*'tensorbored'"),
    ],
)
def test_what_is_no_argument_is_refused_by_name(section, message):
    with pytest.raises(ValueError, match=message):
        checked(section)


@pytest.mark.quick
def test_a_tracker_that_is_missing_is_named_with_what_is_here(monkeypatch):
    monkeypatch.setattr("moe_unlearn.trainer.arguments.get_available_reporting_integrations", lambda: ["mlflow"])
    with pytest.raises(ValueError, match="'wandb' is not installed here: pip install wandb, or .*=none or mlflow$"):
        checked({"report_to": ["mlflow", "wandb"]})


@pytest.mark.quick
@pytest.mark.parametrize(
    "key,own", [("learning_rate", "optimizer.lr"), ("max_steps", "steps"), ("seed", "seed"), ("output_dir", "--out")]
)
def test_what_the_recipe_decides_is_refused_naming_its_key(key, own):
    with pytest.raises(ValueError, match=f"trainer.{key} is decided by {own}: set that"):
        Recipe.load("npo", [f"trainer.{key}=1"])
    with pytest.raises(ValueError, match="trainer.warmup_steps and optimizer.warmup_steps both give the warm-up"):
        Recipe.load("npo", ["trainer.warmup_steps=3", "optimizer.warmup_steps=2"])


@pytest.mark.quick
def test_arguments_that_are_not_used_are_named(tmp_path):
    """They were ignored without a word."""
    recipe = Recipe.load("npo", ["optimizer.lr=1e-3", "optimizer.warmup_steps=2", "trainer.save_only_model=true"])
    own = arguments(tmp_path, learning_rate=5e-4, weight_decay=0.1, optim="sgd")
    with pytest.warns(UserWarning, match="not used: ") as found:
        warn_of_conflicts(own, recipe)
    told = str(found[0].message)
    for words in (
        "TrainingArguments.learning_rate=0.0005 (optimizer.lr is 0.001)",
        "TrainingArguments.weight_decay=0.1 (optimizer.weight_decay is 0.0)",
        "TrainingArguments.optim=sgd (optimizer.name is adamw)",
        "optimizer.warmup_steps=2 of the recipe (TrainingArguments.warmup_steps is 0)",
        "trainer.save_only_model=True of the recipe (TrainingArguments.save_only_model is False)",
    ):
        assert words in told
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agreeing = arguments(tmp_path, learning_rate=1e-3, optim="adamw_torch", warmup_steps=2, save_only_model=True)
        warn_of_conflicts(agreeing, recipe)
        warn_of_conflicts(arguments(tmp_path), Recipe.load("npo"))


def test_an_evaluation_tells_the_losses_of_both_sides(tmp_path):
    """The weighted sum is the loss: gamma times that of forget and alpha times that of retain."""
    torch.manual_seed(0)
    model, dataset = tiny_olmoe(vocab_size=VOCAB), ForgetRetainDataset(examples(10, 1), examples(12, 2), seed=0)
    recipe = Recipe.load("graddiff", ["forget.gamma=0.5", "retain.alpha=3"])
    held = ForgetRetainDataset(examples(10, 1), examples(5, 9), seed=0)
    trainer = UnlearnTrainer(copy.deepcopy(model), arguments(tmp_path), recipe, dataset, eval_dataset=held)
    trainer.prepare()
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(
        0.5 * found["eval_forget_loss"] + 3 * found["eval_retain_loss"], abs=1e-5
    )
    assert found["eval_forget_loss"] < 0 < found["eval_retain_loss"]
    assert trainer.evaluate(dataset)["eval_retain_loss"] != found["eval_retain_loss"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    saved(root)
    return root


def run(folder, out, *settings, options=()):
    quick = ["steps=2", "batch_size=4", "data.max_length=48", *settings]
    return main(["run", "graddiff", *given(folder), "--out", str(out), "--no-eval", *options, "--set", *quick])


def test_the_section_reaches_the_trainer_and_a_resume_knows_it(folder, tmp_path, capsys):
    section = ["trainer.save_strategy=no", "trainer.lr_scheduler_type=linear", "optimizer.lr=1e-3"]
    assert run(folder, tmp_path / "out", *section) == 0
    steps = json.loads((tmp_path / "out" / "trajectory.json").read_text(encoding="utf-8"))["graddiff"]
    assert [step["learning_rate"] for step in steps] == pytest.approx([1e-3, 5e-4])
    assert not [*(tmp_path / "out" / "checkpoints").glob("checkpoint-*")]
    assert run(folder, tmp_path / "out", *section, "trainer.lr_scheduler_type=cosine", options=["--resume"]) == 2
    assert "trainer (was {'save_strategy': 'no', 'lr_scheduler_type': 'linear'}, is" in capsys.readouterr().err
    assert run(folder, tmp_path / "out", *section, "trainer.run_name=mine", options=["--resume"]) == 0
    assert run(folder, tmp_path / "none", "trainer.report_too=x") == 2 and not (tmp_path / "none").exists()


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_gets_the_losses_of_a_run(folder, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    assert run(folder, tmp_path / "out", "trainer.report_to=tensorboard", "trainer.eval_strategy=steps") == 0
    (events,) = (tmp_path / "board").rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events.parent)).Reload()
    assert {"train/forget_loss", "train/retain_loss", "eval/forget_loss", "eval/retain_loss"} <= {
        *board.Tags()["scalars"]
    }
    assert len(board.Scalars("train/forget_loss")) == 2
