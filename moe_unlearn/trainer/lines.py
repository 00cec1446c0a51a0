"""Lines about the steps of a training, to read or for machines, in place of transformers' dicts."""

import json
import math
import sys
import time
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from moe_unlearn import progress

_SHOWN = {"forget_loss": "forget", "retain_loss": "retain", "kl_loss": "kl", "grad_norm": "|g|", "learning_rate": "lr"}


class StepLines(TrainerCallback):
    """Callback that shows a bar over the steps, and a line about every so many of them, as `progress.form` says.

    A line to read goes to stderr: `step 10/60  forget 0.9431  retain 0.1282  lr 1e-05  about 40 s left`. One for
    machines goes to stdout: all that the Trainer logs, and the step, as JSON.
    """

    def __init__(self) -> None:
        self._bar: progress.Bar | None = None
        self._began, self._first = 0.0, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        self._bar = progress.Bar("training", max(state.max_steps - state.global_step, 0), "step")
        self._began, self._first = time.monotonic(), state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        if self._bar is not None:
            self._bar.advance()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        if self._bar is not None:
            self._bar.__exit__()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **keywords: Any,
    ) -> None:
        form, step = progress.form(), state.global_step
        if not logs or "forget_loss" not in logs or not form.every:
            return
        if step % form.every and step not in (self._first + 1, state.max_steps):
            return
        if form.json_lines:
            finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in logs.items()}
            print(json.dumps({"step": step, "steps": state.max_steps} | finite), file=sys.stdout, flush=True)
        else:
            progress.say(self._line(step, state.max_steps, logs))

    def _line(self, step: int, steps: int, logs: dict[str, Any]) -> str:
        numbers = [f"{name} {logs[key]:.4g}" for key, name in _SHOWN.items() if key in logs]
        left = (time.monotonic() - self._began) / max(step - self._first, 1) * (steps - step)
        return "  ".join([f"step {step}/{steps}", *numbers, f"about {progress.duration(left)} left"])


def say_in_lines(trainer: Trainer) -> None:
    """Have a Trainer say in `StepLines` what it would print as dicts."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(StepLines())
