"""Saves and resumes the checkpoints of a Trainer around an unlearning step, each of them whole or not at all.

The folder `checkpoint-N` of the Trainer's `output_dir` appears when all of it is on the disk, and has

    the model, its tokenizer    as `model.saving` writes them: the folder is a model that `from_pretrained` loads
    unlearn_step.*              the state of the step (selection, weights, masks, caches)
    optimizer.*                 the states of the optimizer and of the schedule
    random.json                 the states of the random generators of each rank
    trainer_state.json          transformers' own
    manifest                    the sizes and SHA-256 digests of all of these

where .* is .json and .safetensors: nothing is pickled. Where ranks share the weights out, the folder `unlearn_step` has
what each of them holds of weights, optimizer and schedule instead. Any number of ranks, with any engine or none,
resumes from it, and they resume from a checkpoint of one process. With `save_only_model` a checkpoint has the weights
and the state of the step without the optimizer, however it is saved: who resumes from it begins anew with optimizer and
schedule, and is told.

transformers saves a Mixture-of-Experts checkpoint with one key per expert and, on resume, loads it without converting
back, so that the fused expert weights keep their initial values (transformers issue 48805). Here a resume goes through
`from_pretrained` instead.
"""

import json
import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from moe_unlearn.checkpoint import (
    CheckpointError,
    load_state,
    random_state,
    remove_old,
    save_state,
    set_random_state,
    sharded,
)
from moe_unlearn.errors import NonFiniteError
from moe_unlearn.files import remove_unfinished, write_json
from moe_unlearn.model.resuming import load_pretrained
from moe_unlearn.model.saving import has_adapters, save_model
from moe_unlearn.ranks import gather, on_first
from moe_unlearn.step import UnlearnStep, checks, saved

PREFIX = f"{PREFIX_CHECKPOINT_DIR}-"
_STATE, _OPTIMIZER, _RANDOM = "unlearn_step", "optimizer", "random.json"
_log = logging.getLogger(__name__)


class CheckpointedTrainer(Trainer):
    """A Trainer that saves, finds, verifies and loads checkpoints of its `unlearn_step`."""

    unlearn_step: UnlearnStep
    _verified: Path | None = None  # the newest whole checkpoint, whose bits have been compared once

    @property
    def _sharded(self) -> bool:
        """Return whether this rank holds parts of the weights."""
        return self.unlearn_step.ranks.sharded

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model so that `from_pretrained` loads it (`model.saving.save_model`); every rank calls this."""
        processor: Any = self.processing_class
        save_model(self.unlearn_step.model, output_dir or str(self.args.output_dir), processor)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_weights()
        root = Path(self._get_output_dir(trial=trial))
        folder = root / f"{PREFIX}{self.state.global_step}"
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        if self.state.best_global_step:
            best = root / f"{PREFIX}{self.state.best_global_step}"
            if best == folder or best.exists():
                self.state.best_model_checkpoint = str(best)
        on_first(lambda: remove_unfinished(root))
        about = {"step": self.state.global_step}
        group = self.unlearn_step.ranks.group
        # evaluators may have written to the folder of this step, as open-unlearning's do
        with sharded.sealed_folder(folder, about, own=(_STATE,), group=group) as unfinished:
            self.save_model(str(unfinished), _internal_call=True)
            self._save_step(unfinished)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if limit := self.args.save_total_limit:
            kept = [Path(name)] if (name := self.state.best_model_checkpoint) is not None else []
            on_first(lambda: remove_old(root, keep=limit, prefix=PREFIX, spare=kept))

    def _save_step(self, folder: Path) -> None:
        """Write all of a checkpoint but the model."""
        step, with_optimizer = self.unlearn_step, not self.args.save_only_model
        if self._sharded:
            tree = {"step": self._state()}
            if with_optimizer:
                assert self.lr_scheduler is not None  # training has begun
                tree = saved.tree_of(step) | {"schedule": self.lr_scheduler.state_dict()}
            sharded.save(folder / _STATE, tree, group=step.ranks.group)
        generators = gather(random_state())

        def write() -> None:
            if not self._sharded:
                save_state(folder, _STATE, self._state())
            if with_optimizer:
                write_json(folder / _RANDOM, generators)
            if with_optimizer and not self._sharded:
                assert self.lr_scheduler is not None
                states = {"optimizer": step.optimizer.state_dict(), "schedule": self.lr_scheduler.state_dict()}
                save_state(folder, _OPTIMIZER, states)
            self._note_callbacks()
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

        on_first(write)

    def _note_callbacks(self) -> None:
        """Note the states of callbacks in `state`, which is saved with them."""
        noted: Any = self.state.stateful_callbacks  # transformers has typed the list from which it makes a dict
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                name, state = type(callback).__name__, callback.state()
                if isinstance(noted.get(name), list):
                    noted[name].append(state)
                else:
                    noted[name] = state

    def _state(self) -> dict[str, Any]:
        """Return the state of the step without the optimizer."""
        state = self.unlearn_step.state_dict()
        del state["optimizer"]
        return state

    def check_weights(self) -> None:
        """Raise NonFiniteError, after the newest checkpoint is restored, if trained weights are not finite."""
        try:
            checks.check_weights(self.unlearn_step)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}; {self._restore()}") from None

    def _newest(self) -> Path | None:
        """Return the newest whole checkpoint in `output_dir`."""
        return sharded.latest(str(self.args.output_dir), prefix=PREFIX, group=self.unlearn_step.ranks.group)

    def checkpoint_of(self, wanted: str | bool | None) -> Path | None:
        """Return the checkpoint that `train` is asked to resume, which is whole; None if it is asked for none.

        Nothing is changed. Raises ValueError where True asks for the newest one and none is whole, and CheckpointError
        for a folder that differs from what was written.
        """
        if wanted is True:
            if (newest := self._newest()) is None:
                raise ValueError(
                    f"no checkpoint to resume in {self.args.output_dir!r}: none is there that is whole; put one back "
                    "from a copy, or begin anew: in an empty folder, or with --overwrite where a run is resumed"
                )
            self._verified = newest
            return newest
        if not wanted:
            return None
        if Path(wanted) != self._verified:
            sharded.verify(wanted, group=self.unlearn_step.ranks.group)
        return Path(wanted)

    def _ended(self, checkpoint: Path) -> TrainOutput | None:
        """Load the weights of a checkpoint after which no step is left, and say so; None if there is one left."""
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        limit, epochs = self.args.max_steps, self.args.num_train_epochs
        ended = state.global_step >= limit if limit > 0 else (state.epoch or 0) >= epochs
        if not (ended or self.unlearn_step.done):
            return None
        self._load_weights(checkpoint)
        self.state = state
        _log.warning("%s is of a run that has ended, after %d steps: no step is left", checkpoint, state.global_step)
        return TrainOutput(state.global_step, 0.0, {})

    def _load_step(self, checkpoint: Path) -> None:
        """Restore the state of the step that a checkpoint holds."""
        step = self.unlearn_step
        if _of_ranks(checkpoint):
            state = sharded.load(checkpoint / _STATE, states=["step"])["step"]
        else:
            state, _ = step.ranks.together(lambda: (load_state(checkpoint, _STATE), True))
        step.load_state_dict(state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled and not self._sharded:
            self.unlearn_step.rebind()  # accelerate has just shared the weights out
        self._load_weights(Path(resume_from_checkpoint), model)

    def _load_weights(self, folder: Path, model: nn.Module | None = None) -> None:
        step = self.unlearn_step
        own: Any = self.model if model is None else model
        if "model" in _of_ranks(folder):
            saved.load_weights(step, folder / _STATE)
        elif self._sharded and has_adapters(step.model):
            raise CheckpointError(
                f"{folder} has adapters of whole weights, which do not resume where weights are shared out: load them "
                "with `peft.PeftModel.from_pretrained` as the model to train, and begin anew"
            )
        elif hasattr(own, "peft_config"):
            super()._load_from_checkpoint(str(folder), own)
        else:
            load_pretrained(step.model, folder, step.ranks)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder, step = Path(checkpoint), self.unlearn_step
        assert self.lr_scheduler is not None  # training begins
        found = _of_ranks(folder)
        if "optimizer" in found:
            state = sharded.load(folder / _STATE, states=["step", "schedule"])
            saved.load_optimizer(step, folder / _STATE, state["step"])
            self.lr_scheduler.load_state_dict(state["schedule"])
        elif not found and (folder / f"{_OPTIMIZER}.json").exists():
            states: Any
            states, _ = step.ranks.together(lambda: (load_state(folder, _OPTIMIZER), True))
            saved.take_optimizer(step, states["optimizer"])
            self.lr_scheduler.load_state_dict(states["schedule"])
        else:
            _log.warning("%s was saved without its optimizer: optimizer and schedule begin anew", folder)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        path, rank = Path(checkpoint or "") / _RANDOM, self.unlearn_step.ranks.rank
        states = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        if rank < len(states):
            set_random_state(states[rank])
        elif checkpoint is not None:
            _log.warning("%s has no states of the random generators of rank %d", checkpoint, rank)

    def _restore(self) -> str:
        """Restore the newest whole checkpoint; return what was done."""
        checkpoint = self._newest()
        if checkpoint is None:
            return "there is no checkpoint to restore"
        self._load_from_checkpoint(str(checkpoint))
        self._load_step(checkpoint)
        if self.lr_scheduler is not None:  # training has begun
            self._load_optimizer_and_scheduler(str(checkpoint))
        return f"{checkpoint.name} was restored"

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is not None:
            sharded.verify(best, group=self.unlearn_step.ranks.group)
            self._load_from_checkpoint(best)


def _of_ranks(checkpoint: Path) -> set[str]:
    """Return what ranks that shared weights out have saved in a checkpoint; empty if one process has saved it."""
    return set(sharded.entries(checkpoint / _STATE))
