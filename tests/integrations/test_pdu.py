"""open-unlearning's PDU: its loss, and some steps of its training, by its formulas written out here."""

import copy

import pytest
import torch

from moe_unlearn.integrations.open_unlearning import NPO, PDU
from tests.support.open_unlearning import Paired, Rows, logits, made, mean_nll, one_batch
from tests.support.steps import weights

pytestmark = pytest.mark.quick
# two orders of sums in float64, through a few steps
CLOSE = 2.0**-30
LR = 1e-3
ARGUMENTS = {"gamma": 1.5, "alpha": 0.7, "retain_loss_eps": 3.0, "primal_dual": True, "dual_step_size": 0.4}


def margin(model, batch):
    """Its forget loss: logits of the labelled tokens, not of the positions that predict them."""
    z, mask = logits(model, batch).flatten(0, 1), (batch["labels"] != -100).flatten()
    each = (z.max(dim=-1)[0] - z.mean(dim=-1)) ** 2
    return (each * mask).sum() / mask.sum()


class Theirs:
    """Its trainer's preference and updates: at each batch, or after an epoch by the mean over its batches."""

    def __init__(self, model, upon="step", warmup=0):
        self.model, self.upon, self.warmup, self.preference = model, upon, warmup, ARGUMENTS["alpha"]
        self.moves = warmup == 0
        self.optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.0)
        self.logged = []

    def epoch(self, batches, number):
        for batch in batches:
            forget, retain = margin(self.model, batch["forget"]), mean_nll(self.model, batch["retain"])
            excess = retain - ARGUMENTS["retain_loss_eps"]
            (ARGUMENTS["gamma"] * forget + self.preference * excess).backward()
            self.logged.append((forget.item(), retain.item(), self.preference))
            if self.moves and self.upon == "step":
                self.move(excess.item())
            self.optimizer.step()
            self.optimizer.zero_grad()
        if number >= self.warmup:
            self.moves = True
            if self.upon == "epoch":
                with torch.no_grad():
                    losses = [mean_nll(self.model, batch["retain"]).item() for batch in batches]
                self.move(sum(losses) / len(losses) - ARGUMENTS["retain_loss_eps"])

    def move(self, excess):
        self.preference = max(0, self.preference + ARGUMENTS["dual_step_size"] * excess)


def built(tmp_path, rows, **keywords):
    """A trainer of three epochs of three batches, with a checkpoint at each step."""
    arguments = {"num_train_epochs": 3, "learning_rate": LR, "lr_scheduler_type": "constant"}
    return made(PDU, tmp_path, rows, arguments | {"save_strategy": "steps", "save_steps": 1}, **ARGUMENTS, **keywords)


def path_of(trainer):
    logged = [entry for entry in trainer.state.log_history if "retain_alpha" in entry]
    return [tuple(entry[key] for key in ("forget_loss", "retain_loss", "retain_alpha")) for entry in logged]


@pytest.mark.parametrize("dual", [True, False])
def test_the_loss_is_open_unlearnings(dual, tmp_path):
    trainer = made(PDU, tmp_path, Rows(), **(ARGUMENTS if dual else {"gamma": 1.5, "alpha": 0.7}))
    batch = one_batch(trainer)
    assert (batch["forget"]["attention_mask"] == 0).any()  # padding takes part
    with torch.no_grad():
        ours = trainer.compute_loss(trainer.model, batch)
        excess = mean_nll(trainer.model, batch["retain"]) - (3.0 if dual else 0.0)
        expected = 1.5 * margin(trainer.model, batch["forget"]) + 0.7 * excess
    assert float(ours) == pytest.approx(float(expected), rel=2e-6)
    assert trainer.unlearn_step.objectives.dual.value == 0.7  # a loss alone moves nothing


# name -> when the preference moves, warm-up in epochs, how many values it has in nine steps
WAYS = {"step": ("step", 0, 9), "warm step": ("step", 2, 3), "epoch": ("epoch", 0, 3), "warm epoch": ("epoch", 2, 2)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.slow
def test_a_training_is_open_unlearnings(way, tmp_path):
    upon, warmup, values = WAYS[way]
    # retain rows that are not drawn and have one length: the means of its batches are those of the tokens
    trainer = built(tmp_path, Paired(lengths=(9, 9)), dual_update_upon=upon, dual_warmup_epochs=warmup)
    trainer.model.double()
    theirs, start, seen = Theirs(copy.deepcopy(trainer.model), upon, warmup), weights(trainer.model), []
    theirs.model.set_experts_implementation("eager")
    accumulate = trainer.unlearn_step.accumulate

    def watched(forget, retain, **keywords):
        seen.append({"forget": forget, "retain": retain})
        return accumulate(forget, retain, **keywords)

    trainer.unlearn_step.accumulate = watched
    trainer.train()
    for epoch in range(3):
        theirs.epoch(seen[3 * epoch : 3 * epoch + 3], epoch + 1)
    assert len(theirs.logged) == 9 and len({preference for *_, preference in theirs.logged}) == values
    for ours, expected in zip(path_of(trainer), theirs.logged, strict=True):
        assert ours == pytest.approx(expected, rel=CLOSE)
    truth = weights(theirs.model)
    for name, ours in weights(trainer.model).items():
        assert (ours - truth[name]).abs().max() <= CLOSE * (truth[name] - start[name]).abs().max(), name


@pytest.mark.parametrize("way,at", [("warm step", 5), ("warm step", 7), ("epoch", 3), ("epoch", 4), ("warm epoch", 6)])
@pytest.mark.slow
def test_a_resume_goes_on_where_it_was(way, at, tmp_path):
    """With the end of an epoch between a checkpoint and what follows it, and in the middle of one."""
    upon, warmup, values = WAYS[way]
    # in the middle of an epoch the Trainer does not find the random state again in which a dataset drew rows
    rows = Paired() if at % 3 else Rows()
    whole, again = (built(tmp_path, rows, dual_update_upon=upon, dual_warmup_epochs=warmup) for _ in range(2))
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert path_of(again) == path_of(whole) and len({alpha for *_, alpha in path_of(whole)}) == values
    ours, truth = weights(again.model), weights(whole.model)
    assert all(torch.equal(ours[name], truth[name]) for name in truth)


def test_other_methods_take_the_dual_variable(tmp_path):
    trainer = made(NPO, tmp_path, arguments={"max_steps": 2}, alpha=0.5, dual={"retain_loss_eps": 3.0})
    trainer.train()
    first, second = (alpha for *_, alpha in path_of(trainer))
    assert first == 0.5 < second


@pytest.mark.parametrize(
    "change,message",
    [
        ({"dual_update_upon": "batch"}, "dual_update_upon must be one of step, epoch; got 'batch'"),
        ({"dual_step_size": 0}, "dual.step_size must be above 0; got 0.0"),
        ({"retain_loss_eps": -1}, "dual.retain_loss_eps must be at least 0; got -1.0"),
    ],
)
def test_bad_arguments_are_named(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        made(PDU, tmp_path, **ARGUMENTS | change)
