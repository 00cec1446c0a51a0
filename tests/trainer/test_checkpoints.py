"""Checkpoints of the Trainer: whole or not used, whatever becomes of their files, and resumed with the same bits."""

import copy
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import TrainerCallback

from moe_unlearn import files
from moe_unlearn.checkpoint import CheckpointError, sharded
from moe_unlearn.config import Recipe
from moe_unlearn.data import ForgetRetainDataset
from moe_unlearn.errors import NonFiniteError
from moe_unlearn.step import UnlearnStep
from moe_unlearn.trainer import UnlearnTrainer
from moe_unlearn.trainer.checkpoints import PREFIX
from tests.support.damage import FORMS, damaged
from tests.support.models import tiny_olmoe
from tests.support.training import VOCAB, arguments, differing, examples


def made(folder, max_steps=4, **keywords):
    """A trainer of three steps an epoch; every call has the same model."""
    torch.manual_seed(0)
    pairs = ForgetRetainDataset(examples(10, 1), examples(12, 2), seed=0)
    recipe = Recipe.load("npo", ["optimizer.lr=1e-2", "optimizer.name=adamw"])
    return UnlearnTrainer(tiny_olmoe(VOCAB), arguments(folder, max_steps=max_steps, **keywords), recipe, pairs)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run of four steps, with checkpoints at 2 and 4, and its model."""
    folder = tmp_path_factory.mktemp("run")
    trainer = made(folder)
    trainer.train()
    return folder, trainer.model


@pytest.fixture
def folder(run, tmp_path):
    """A copy of that folder, to be damaged."""
    shutil.copytree(run[0], tmp_path / "run")
    return tmp_path / "run"


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_checkpoint_is_safetensors_and_json_under_one_manifest(run):
    newest = run[0] / "checkpoint-4"
    files = {path.name for path in newest.iterdir()}
    assert {"optimizer.safetensors", "optimizer.json", "random.json", "trainer_state.json", "config.json"} < files
    for path in newest.iterdir():
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as opened:
                assert list(opened.keys()) or path.name == "unlearn_step.safetensors"
        elif path.name == "manifest":
            body = path.read_bytes().partition(b"\n")[2]
            assert json.loads(body)["files"].keys() == files - {"manifest"}
        else:
            assert path.suffix == ".json"
            json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.filterwarnings("ignore:skipping a broken checkpoint")
def test_no_damage_to_any_file_is_accepted(folder):
    """A removed, cut or flipped file: 31 of 190 such checkpoints were resumed without a word."""
    generator, tried = random.Random(0), 0
    for path in sorted((folder / "checkpoint-4").iterdir()):
        content = path.read_bytes()
        for form in (*FORMS, *["flipped bit"] * 7):
            if (changed := damaged(content, form, generator)) == content:
                continue
            path.unlink() if changed is None else path.write_bytes(changed)
            assert sharded.latest(folder, prefix=PREFIX).name == "checkpoint-2", (path.name, changed)
            with pytest.raises(CheckpointError, match="manifest" if path.name == "manifest" else path.name):
                sharded.verify(folder / "checkpoint-4")
            path.write_bytes(content)
            tried += 1
    assert tried >= 90 and sharded.latest(folder, prefix=PREFIX).name == "checkpoint-4"


def test_a_resume_names_a_damaged_checkpoint_keeps_it_and_goes_on_from_the_one_before(run, folder):
    """Without its optimizer's file it was resumed with fresh moments, without config.json from a random model."""
    (folder / "checkpoint-4" / "optimizer.safetensors").unlink()
    again = made(folder)
    torch.rand(7)  # where the generators stand does not matter
    with pytest.warns(UserWarning, match=r"skipping a broken checkpoint: .*checkpoint-4: file 'optimizer.safetensors'"):
        again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4 and differing(again.model, run[1]) == []
    # as `guard: loss` restores it
    (folder / "checkpoint-4" / "config.json").unlink()
    with pytest.warns(UserWarning, match="skipping a broken checkpoint"):
        assert again._restore() == "checkpoint-2 was restored"
    assert again.unlearn_step.steps == 2 and differing(again.model, run[1]) and (folder / "checkpoint-4").is_dir()
    with pytest.raises(CheckpointError, match="file 'config.json' is missing"):
        made(folder).train(resume_from_checkpoint=str(folder / "checkpoint-4"))


def test_a_run_that_has_ended_trains_no_more(run, folder, caplog):
    """Its four steps end within an epoch of three: a fifth was made, and saved as a checkpoint of its own."""
    before = contents(folder)
    again = made(folder)
    with torch.no_grad():
        for p in again.model.parameters():
            p.zero_()
    again.train(resume_from_checkpoint=True)
    assert "no step is left" in caplog.text and contents(folder) == before
    assert again.state.global_step == again.unlearn_step.steps == 4 and differing(again.model, run[1]) == []
    longer = made(folder, max_steps=5)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 5


def test_a_damaged_checkpoint_does_not_push_a_whole_one_out(folder):
    """Counted as the newest of the one that is kept it would have the new one removed."""
    (folder / "checkpoint-4" / "model.safetensors").write_bytes(b"short")
    with pytest.warns(UserWarning, match="skipping a broken checkpoint"):
        made(folder, max_steps=3, save_total_limit=1).train(resume_from_checkpoint=True)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-3", "checkpoint-4"]


def test_a_disk_that_is_full_at_any_file_of_a_checkpoint_leaves_what_was_there(folder, monkeypatch):
    """163 of 324 killed saves left a newest checkpoint that was a part of one, and stood in the way."""
    trainer = made(folder)
    evaluated = folder / "checkpoint-4" / "evals" / "found.json"
    for name in ("evals", "unlearn_step"):  # of an evaluator, and of an earlier run of ranks
        (folder / "checkpoint-4" / name).mkdir()
    evaluated.write_text("1", encoding="utf-8")
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert evaluated.read_text(encoding="utf-8") == "1" and not (folder / "checkpoint-4" / "unlearn_step").exists()
    evaluated.write_text("2", encoding="utf-8")  # which damages nothing
    before, sync, left, count = contents(folder), files._sync, [], 0

    def full(path):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device", str(path))
        sync(path)

    monkeypatch.setattr("moe_unlearn.files._sync", full)
    while True:
        left[:] = [count]
        try:
            trainer._save_checkpoint(trainer.model, None)
            break
        except OSError as error:
            assert error.errno == 28 and contents(folder) == before and len(list(folder.iterdir())) == 2
            count += 1
    assert count >= len(list((folder / "checkpoint-4").iterdir()))
    assert sharded.latest(folder, prefix=PREFIX).name == "checkpoint-4"


class Spoil(TrainerCallback):
    """Makes a weight infinite after a step, as an update that overflows does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **keywords):
        if state.global_step == self.step:
            with torch.no_grad():
                model.model.layers[0].mlp.experts.down_proj[0, 0, 0] = torch.inf


def test_weights_that_are_not_finite_are_not_saved(run, folder):
    """The last update was never looked at: no step followed, in which a loss would have told."""
    shutil.rmtree(folder / "checkpoint-4")
    again = made(folder)
    again.add_callback(Spoil(4))
    with pytest.raises(NonFiniteError, match="1 of the trained parameters .*down_proj.*checkpoint-2 was restored"):
        again.train(resume_from_checkpoint=True)
    assert again.unlearn_step.steps == 2 and all(p.isfinite().all() for p in again.model.parameters())
    assert [path.name for path in Path(folder).iterdir()] == ["checkpoint-2"]


def test_every_so_many_steps_all_trained_weights_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_unlearn.trainer.trainer.CHECKED", 2)
    seen = []
    monkeypatch.setattr(UnlearnTrainer, "check_weights", lambda self: seen.append(self.unlearn_step.steps))
    made(tmp_path, save_strategy="no").train()
    assert seen == [2, 4]


@pytest.mark.quick
def test_float16_weights_are_refused(run):
    model = copy.deepcopy(run[1]).half()
    with pytest.raises(ValueError, match="is float16.*--dtype bfloat16"):
        UnlearnStep(model, "graddiff")
