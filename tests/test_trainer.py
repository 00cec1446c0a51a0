"""UnlearnTrainer: a transformers Trainer that unlearns, resumes bitwise and saves loadable models."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from moe_unlearn.config import Recipe
from moe_unlearn.data import ForgetRetainDataset
from moe_unlearn.errors import NonFiniteError
from moe_unlearn.sharding.launched import each_batch_synced
from moe_unlearn.step import UnlearnStep
from moe_unlearn.trainer import UnlearnTrainer
from tests.support.models import tiny_olmoe
from tests.support.training import VOCAB, arguments, combined, differing, examples


@pytest.fixture
def dataset():
    # three steps an epoch: the checkpoints at 2 and 4 stand in the middle of one
    return ForgetRetainDataset(examples(10, 1), examples(12, 2), seed=0)


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    return tiny_olmoe(vocab_size=VOCAB)


@pytest.mark.parametrize("before", [{}, {"sync_each_batch": False, "num_steps": 2}])
def test_what_accelerate_is_told_ends_with_the_training(before):
    """It holds for all Trainers of a process."""
    accelerator = SimpleNamespace(gradient_state=SimpleNamespace(plugin_kwargs=dict(before)))
    for wanted in (True, False):
        with pytest.raises(KeyboardInterrupt), each_batch_synced(accelerator, wanted=wanted):
            told = before | ({"sync_each_batch": True} if wanted else {})
            assert accelerator.gradient_state.plugin_kwargs == told
            raise KeyboardInterrupt
        assert accelerator.gradient_state.plugin_kwargs == before


def test_a_forget_loss_that_is_low_enough_ends_the_run(tmp_path, original, dataset):
    def run(**limits):
        model = copy.deepcopy(original)
        trainer = UnlearnTrainer(model, arguments(tmp_path), replace(combined(), **limits), dataset)
        trainer.train()
        return trainer, [entry["forget_loss"] for entry in trainer.state.log_history if "forget_loss" in entry]

    _, losses = run()
    limit = losses[3]
    first = next(i for i, loss in enumerate(losses) if loss <= limit)
    stopped, seen = run(stop_forget_loss=limit)
    assert seen == losses[: first + 1]
    assert stopped.state.global_step == stopped.unlearn_step.steps == first + 1
    assert stopped.unlearn_step.done
    assert not run(stop_forget_loss=min(losses) / 2)[0].unlearn_step.done


def test_trains_logs_and_calls_back(original, dataset, tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **keywords):
            seen.append(state.global_step)

    trainer = UnlearnTrainer(copy.deepcopy(original), arguments(tmp_path), combined(), dataset, callbacks=[Watch()])
    trainer.train()
    assert seen == [1, 2, 3, 4, 5, 6] and trainer.unlearn_step.steps == 6
    logged = [entry for entry in trainer.state.log_history if "forget_loss" in entry]
    assert len(logged) == 6
    assert {"retain_loss", "kl_loss", "lambda_forget", "lambda_kl", "grad_norm", "learning_rate"} <= set(logged[0])
    assert logged[-1]["learning_rate"] < logged[0]["learning_rate"]
    assert differing(trainer.model, original)


@pytest.mark.parametrize("name", ["npo", "graddiff"])
def test_a_resume_on_other_rows_is_refused(original, dataset, tmp_path, name):
    """Also where no cache holds them, and they were trained on without a word."""
    recipe = Recipe.load(name, ["optimizer.lr=1e-3"])
    UnlearnTrainer(copy.deepcopy(original), arguments(tmp_path, max_steps=2), recipe, dataset).train()
    rows = dataset.forget[:5] + [replace(e, input_ids=e.input_ids[::-1]) for e in dataset.forget[5:]]
    told = {
        "npo": [
            "row 1 of this batch has the index 5, under which",
            r"rows \[2\] of this batch were not seen by prepare",
        ],
        "graddiff": [r"row 5 of the forget rows is none of the 10 that prepare\(\) saw"],
    }
    for forget, words in zip((rows, [*dataset.forget, rows[-1]]), told[name], strict=False):
        other = ForgetRetainDataset(forget, dataset.retain, seed=0)
        again = UnlearnTrainer(copy.deepcopy(original), arguments(tmp_path), recipe, other)
        with pytest.raises(ValueError, match=words):
            again.train(resume_from_checkpoint=True)
        assert not differing(again.model, original)


def test_gradient_checkpointing_changes_nothing(original, dataset, tmp_path):
    """SEUF's anchor is made of what a layer that is run again computes."""
    ends = []
    for use in (None, True, False):
        checkpointing = {} if use is None else {"gradient_checkpointing_kwargs": {"use_reentrant": use}}
        own = arguments(tmp_path, max_steps=2, gradient_checkpointing=use is not None, **checkpointing)
        recipe = Recipe.load("seuf", ["scope.anchor=100", "optimizer.lr=1e-2"])
        trainer = UnlearnTrainer(copy.deepcopy(original), own, recipe, dataset)
        trainer.train()
        ends.append(trainer.model)
    assert differing(ends[0], original) and not differing(ends[0], ends[1]) and not differing(ends[0], ends[2])


@pytest.mark.parametrize("asked", ["arguments", "environment", "state"])
def test_deepspeed_is_refused_however_it_is_asked_for(original, dataset, tmp_path, monkeypatch, asked):
    own, validate = arguments(tmp_path), Trainer._validate_args

    def enabled(self):
        validate(self)
        self.is_deepspeed_enabled = True

    if asked == "arguments":
        own.deepspeed = {"zero_stage": 3}
    elif asked == "environment":  # what `accelerate launch --use_deepspeed` sets
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    else:
        monkeypatch.setattr(Trainer, "_validate_args", enabled)
    with pytest.raises(ValueError, match="DeepSpeed shares weights out in a way that is not supported"):
        UnlearnTrainer(copy.deepcopy(original), own, combined(), dataset)


def test_forgets(original, dataset, tmp_path):
    recipe = Recipe.load("npo", ["optimizer.lr=3e-3"])
    trainer = UnlearnTrainer(copy.deepcopy(original), arguments(tmp_path), recipe, dataset)
    trainer.train()
    forget = [entry["forget_loss"] for entry in trainer.state.log_history if "forget_loss" in entry]
    # the first value is (2 / beta) log 2 whatever the batch
    assert forget[0] == pytest.approx(13.863, abs=0.01) and max(forget[3:]) < forget[0]


@pytest.mark.parametrize("at", [2, 4])
def test_resume_is_bitwise(original, dataset, tmp_path, at):
    whole = UnlearnTrainer(copy.deepcopy(original), arguments(tmp_path / "a"), combined(), dataset)
    whole.train()
    torch.manual_seed(7)
    again = UnlearnTrainer(copy.deepcopy(original), arguments(tmp_path / "a"), combined(), dataset)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{at}"))
    assert again.unlearn_step.steps == 6
    assert differing(again.model, whole.model) == []


def test_resume_restores_experts_where_transformers_does_not(original, dataset, tmp_path):
    """Fails when a resume leaves the fused expert weights at their initial values."""
    trainer = UnlearnTrainer(copy.deepcopy(original), arguments(tmp_path, max_steps=2), combined(), dataset)
    trainer.train()
    fresh = copy.deepcopy(original)
    assert any("experts" in name for name in differing(trainer.model, fresh))
    other = UnlearnTrainer(fresh, arguments(tmp_path, max_steps=2), combined(), dataset)
    other._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    assert differing(other.model, trainer.model) == []


def test_matches_the_step_without_a_trainer(original, dataset, tmp_path):
    """One update through the Trainer equals one call of the step on the same batch."""
    recipe = Recipe.load("graddiff", ["optimizer.lr=1e-3", "optimizer.name=sgd"])
    trainer = UnlearnTrainer(
        copy.deepcopy(original),
        arguments(tmp_path, max_steps=1, lr_scheduler_type="constant", max_grad_norm=0.0),
        recipe,
        dataset,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    by_hand = copy.deepcopy(original).train()
    UnlearnStep(by_hand, recipe)(batch["forget"], batch["retain"])
    trainer.train()
    assert differing(trainer.model, by_hand) == []


def test_gradient_accumulation_makes_one_step_of_several_batches(original, dataset, tmp_path):
    trainer = UnlearnTrainer(
        copy.deepcopy(original),
        arguments(tmp_path, max_steps=3, gradient_accumulation_steps=2),
        combined(),
        dataset,
    )
    trainer.train()
    assert trainer.unlearn_step.steps == 3 and trainer.state.global_step == 3


def test_clipping_limits_the_norm(original, dataset, tmp_path):
    norms = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **keywords):
            compact = trainer.unlearn_step.gradients.collected
            grads = [g for p in model.parameters() if (g := compact.get(p, p.grad)) is not None]
            norms.append(float(torch.stack([g.norm() for g in grads]).norm()))

    recipe = Recipe.load("graddiff", ["optimizer.lr=1e-3"])
    trainer = UnlearnTrainer(
        copy.deepcopy(original),
        arguments(tmp_path, max_steps=2, max_grad_norm=0.01),
        recipe,
        dataset,
        callbacks=[Watch()],
    )
    trainer.train()
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)


@pytest.mark.parametrize("bf16", [False, True])
def test_steps_in_the_trainer_are_verified(bf16, original, dataset, tmp_path):
    model = copy.deepcopy(original)
    options = arguments(tmp_path, max_steps=3, gradient_accumulation_steps=2, max_grad_norm=0.1, bf16=bf16)
    trainer = UnlearnTrainer(model, options, combined("mollm=null"), dataset, verify=2)
    trainer.train()
    reports = trainer.unlearn_step.verifier.reports
    assert [r.step for r in reports] == [1, 2] and all(r.compared and 0 < r.largest for r in reports)
    logged = [entry.get("verify_difference") for entry in trainer.state.log_history if "forget_loss" in entry]
    assert logged == [reports[0].largest, reports[1].largest, None]


def test_a_saved_model_loads_and_keeps_its_bits(original, dataset, tmp_path):
    trainer = UnlearnTrainer(copy.deepcopy(original), arguments(tmp_path, max_steps=2), combined(), dataset)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert differing(loaded, trainer.model) == []


def test_a_run_that_diverges_stops_before_the_update_and_keeps_its_checkpoint(original, dataset, tmp_path):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **keywords):
            if state.global_step == 3:
                with torch.no_grad():
                    model.model.norm.weight.fill_(torch.nan)

    trainer = UnlearnTrainer(copy.deepcopy(original), arguments(tmp_path), combined(), dataset, callbacks=[Break()])
    with pytest.raises(NonFiniteError, match="stopped before the update; 3 steps done"):
        trainer.train()
    saved = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text(encoding="utf-8"))
    assert saved["global_step"] == 2


def test_evaluation_reports_the_objectives(original, dataset, tmp_path):
    trainer = UnlearnTrainer(
        copy.deepcopy(original), arguments(tmp_path, max_steps=1), combined(), dataset, eval_dataset=dataset
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("graddiff", ["forget.gamma=0.5", "retain.alpha=3", "retain.router_aux=0.2"]),
        ("seuf", ["scope.anchor=7"]),
        ("pdu", ["retain.alpha=2", "dual.retain_loss_eps=9"]),
        ("mollm", ["forget.gamma=0.5"]),
    ],
)
def test_the_logged_loss_is_what_a_step_minimises(original, dataset, tmp_path, name, overrides):
    """The loss of a first step is the evaluation's of its batches, whose losses are logged one by one beside it."""
    model = copy.deepcopy(original)
    own = arguments(tmp_path, max_steps=1, gradient_accumulation_steps=2, save_strategy="no")
    trainer = UnlearnTrainer(model, own, Recipe.load(name, ["optimizer.lr=1e-3", *overrides]), dataset)
    trainer.train()
    logged = trainer.state.log_history[0]
    losses = {key.removesuffix("_loss"): value for key, value in logged.items() if key.endswith("_loss")}
    recipe, step = trainer.unlearn_step.recipe, trainer.unlearn_step
    alpha, bound = recipe.retain.alpha, recipe.dual.retain_loss_eps if recipe.dual else 0
    factors = {"forget": recipe.forget.gamma, "retain": alpha, "kl": 1.0, "anchor": recipe.scope.anchor}
    factors["router_aux"] = alpha * step.objectives.router_aux
    assert logged["loss"] == pytest.approx(sum(factors[n] * v for n, v in losses.items()) - alpha * bound, abs=1e-4)
    assert losses.keys() > {"forget"} and logged["loss"] != pytest.approx(sum(losses.values()), abs=1e-3)
    # and as an evaluation weighs it, on the same rows of the same model
    again = UnlearnTrainer(copy.deepcopy(original).train(), own, recipe, dataset)
    again.prepare()
    pair = again.data_collator([dataset[i] for i in range(4)])
    evaluated = again.prediction_step(again.model, pair, True)[0]
    found = UnlearnTrainer(copy.deepcopy(original), own, recipe, dataset)
    found.prepare()
    found.accelerator.gradient_state._set_sync_gradients(True)
    assert float(found.training_step(found.model, pair)) == pytest.approx(float(evaluated), abs=1e-4)


@pytest.mark.quick
def test_errors(original, dataset, tmp_path):
    model = copy.deepcopy(original)
    with pytest.raises(ValueError, match="recipe's optimizer section"):
        UnlearnTrainer(model, arguments(tmp_path), combined(), dataset, optimizers=(None, None))
    with pytest.raises(ValueError, match="non-empty list of examples 'forget'"):
        UnlearnTrainer(model, arguments(tmp_path), combined(), torch.utils.data.TensorDataset(torch.ones(2)))
    trainer = UnlearnTrainer(model, arguments(tmp_path), combined(), dataset)
    with pytest.raises(ValueError, match="no checkpoint to resume"):
        trainer.train(resume_from_checkpoint=True)


def test_mixed_precision_reaches_the_step(original, dataset, tmp_path):
    losses = []
    for bf16 in (False, True):
        trainer = UnlearnTrainer(
            copy.deepcopy(original), arguments(tmp_path / str(bf16), max_steps=1, bf16=bf16), "graddiff", dataset
        )
        trainer.train()
        losses.append(trainer.state.log_history[0]["retain_loss"])
    # bfloat16 keeps 8 bits
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=2**-6)


@pytest.mark.quick
def test_ranks_that_the_arguments_do_not_see_are_no_lone_processes(original, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("moe_unlearn.trainer.trainer.everyone", object)
    with pytest.raises(ValueError, match="found one process, though torch.distributed has more: .* use_cpu=True"):
        UnlearnTrainer(original, arguments(tmp_path), combined(), dataset)
