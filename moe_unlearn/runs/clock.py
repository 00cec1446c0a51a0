"""Counts the seconds of a run over interruptions: each checkpoint keeps those that it has taken."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState


class Clock(TrainerCallback, ExportableState):
    """A callback whose state, which the Trainer keeps in every checkpoint, is the seconds of preparation and steps.

    `before` are those of the runs that a resume goes on with; what these did after their checkpoint is done again, and
    counts once.
    """

    def __init__(self, before: float = 0.0):
        self._seconds, self._since = before, 0.0

    @classmethod
    def of_checkpoint(cls, checkpoint: Path | None) -> "Clock":
        """Return a clock that goes on where that of a checkpoint was, from 0 where there is none."""
        if checkpoint is None:
            return cls()
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        kept = state["stateful_callbacks"].get(cls.__name__, {"attributes": {"seconds": 0.0}})
        return cls(kept["attributes"]["seconds"])

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the seconds of what is done inside."""
        self._since = time.perf_counter()
        try:
            yield
        finally:
            self._seconds, self._since = self.seconds, 0.0

    @property
    def seconds(self) -> float:
        """Return the seconds counted so far."""
        return self._seconds + (time.perf_counter() - self._since if self._since else 0.0)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, in transformers' form."""
        return {"args": {}, "attributes": {"seconds": self.seconds}}
