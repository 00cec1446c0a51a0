"""The section `trainer` of a recipe: what transformers' Trainer is told beside what other keys of the recipe decide."""

from typing import Any

#: arguments of transformers that a key of the recipe, or an option of the command line, decides
OWNED = {
    "output_dir": "--out",
    "resume_from_checkpoint": "--resume",
    "max_steps": "steps",
    "num_train_epochs": "steps",
    "per_device_train_batch_size": "batch_size",
    "auto_find_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulate",
    "learning_rate": "optimizer.lr",
    "optim": "optimizer.name",
    "optim_args": "optimizer",
    "optim_target_modules": "scope.parameters",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "adam_epsilon": "optimizer.eps",
    "max_grad_norm": "optimizer.max_grad_norm",
    "gradient_checkpointing": "checkpointing",
    "gradient_checkpointing_kwargs": "checkpointing",
    "activation_checkpointing": "checkpointing",
    "activation_checkpointing_kwargs": "checkpointing",
    "seed": "seed",
    "data_seed": "seed",
    "use_cpu": "--device",
    "fsdp": "--mesh",
    "fsdp_config": "--mesh",
    "remove_unused_columns": "the rows, which are pairs",
}


def check_trainer(section: dict[str, Any], warmup_steps: int) -> None:
    """Raise ValueError, which names the recipe's own key, for an argument that another key decides."""
    for key in section:
        if key in OWNED:
            raise ValueError(f"trainer.{key} is decided by {OWNED[key]}: set that, and leave trainer.{key} out")
    if section.get("warmup_steps") and warmup_steps:
        raise ValueError("trainer.warmup_steps and optimizer.warmup_steps both give the warm-up: leave one of them out")
