"""What tests of training share: small examples, arguments of a trainer, a recipe with every lever."""

import torch
from transformers import TrainingArguments

from moe_unlearn.config import Recipe
from moe_unlearn.data import Example

VOCAB = 64


def examples(count, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, VOCAB, (count, 14), generator=generator).tolist()
    return [Example(r[: 8 + i % 6], [-100, -100, *r[2 : 8 + i % 6]], 2) for i, r in enumerate(rows)]


def arguments(folder, **keywords):
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=keywords.pop("max_steps", 6),
        save_strategy=keywords.pop("save_strategy", "steps"),
        save_steps=2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        lr_scheduler_type=keywords.pop("lr_scheduler_type", "linear"),
        **keywords,
    )


def combined(*overrides):
    return Recipe.load("combined", ["trace.min_ratio=1.01", "trace.eta=0.3", "optimizer.lr=1e-3", *overrides])


def differing(a, b):
    return [n for (n, p), q in zip(a.named_parameters(), b.parameters(), strict=True) if not torch.equal(p, q)]
