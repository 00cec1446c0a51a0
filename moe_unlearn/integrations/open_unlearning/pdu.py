"""open-unlearning's PDU, which flattens forget logits while a dual variable bounds the retain loss; see `step.dual`."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moe_unlearn.data import generator
from moe_unlearn.integrations.open_unlearning.methods import GradDiff
from moe_unlearn.model.batches import attended_mask
from moe_unlearn.model.modes import evaluation_mode
from moe_unlearn.ops.token_loss import IGNORED
from moe_unlearn.step.tally import Tally

UPON = ("step", "epoch")


class PDU(GradDiff):
    """Mean of (max z - mean z)^2 at the labelled tokens of the forget rows, plus a preference times the retain loss.

    Args:
        retain_loss_eps: the bound of the retain loss.
        primal_dual: whether the preference, alpha at first, moves by `dual_step_size` times the excess over the bound.
        dual_update_upon: when it moves: after each "step", by the step's retain loss; or after each "epoch", by that
            of the epoch's retain rows in evaluation mode, which one more pass over them computes.
        dual_warmup_epochs: the number of epochs during which it does not move.

    The logs have the preference as `retain_alpha`. Raises ValueError as `GradDiff` and `config.Dual` do, and for
    another `dual_update_upon`.
    """

    forget_objective = "logit_margin"

    def __init__(
        self,
        *,
        retain_loss_eps: float = 0.0,
        primal_dual: bool = False,
        dual_step_size: float = 1.0,
        dual_update_upon: str = "step",
        dual_warmup_epochs: float = 0,
        **keywords: Any,
    ):
        if dual_update_upon not in UPON:
            raise ValueError(f"dual_update_upon must be one of {', '.join(UPON)}; got {dual_update_upon!r}")
        bound = {"retain_loss_eps": float(retain_loss_eps), "step_size": float(dual_step_size)}
        super().__init__(dual=bound if primal_dual else None, **keywords)
        if primal_dual:
            self.add_callback(_ByEpoch(self, dual_update_upon, dual_warmup_epochs))

    def _rows(self, batch: Mapping) -> dict[str, torch.Tensor]:
        rows = super()._rows(batch)
        if not {"attention_mask", "labels"} <= rows.keys():
            return rows
        # open-unlearning flattens the logits at the labelled tokens themselves, not those that predict them
        return rows | {"state_mask": attended_mask(rows) & (rows["labels"] != IGNORED)}

    @torch.no_grad()
    def retain_losses(self, epoch: int) -> dict[str, float]:
        """Compute a step's retain losses over the retain rows drawn for this epoch, which come with each forget row."""
        step, size = self.unlearn_step, self.args.per_device_train_batch_size
        rows: Any = self.train_dataset
        tally = Tally(step.ranks)
        with torch.random.fork_rng([]), evaluation_mode(step.model):
            torch.default_generator.manual_seed(generator(self.args.seed, epoch).initial_seed())
            for start in range(0, len(rows), size):
                items = [rows[i] for i in range(start, min(start + size, len(rows)))]
                batch = self._prepare_inputs(self.data_collator(items))
                values = step.objectives.retain(batch["retain"])
                units = step.objectives.units(batch["forget"], batch["retain"])
                tally.add(tally.measure(values, units), None, False)
        return tally.losses()


class _ByEpoch(TrainerCallback):
    """Callback for the preference: lets steps move it after the warm-up, or moves it itself after each epoch."""

    def __init__(self, trainer: PDU, upon: str, warmup: float):
        self.trainer, self.upon, self.warmup = trainer, upon, warmup

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        # this is done when the next epoch begins, not when one ends, because a checkpoint between them may be resumed
        epoch, objectives = int(state.epoch or 0), self.trainer.unlearn_step.objectives
        warm = epoch >= self.warmup
        objectives.dual.held = self.upon == "epoch" or not warm
        if self.upon == "epoch" and warm and epoch and state.epoch == epoch:
            objectives.dual.ascend(self.trainer.retain_losses(epoch), objectives.router_aux)
