"""UnlearnTrainer, which runs the unlearning step inside transformers' Trainer, and its checkpoints."""

from moe_unlearn.trainer.trainer import UnlearnTrainer

__all__ = ["UnlearnTrainer"]
