"""What tests of open-unlearning share: its rows, trainers of tiny models, losses by formulas written out."""

import torch
from torch.nn.functional import log_softmax
from torch.utils.data import Dataset
from transformers import TrainingArguments

from tests.support.models import tiny_olmoe


class Rows(Dataset):
    """Items {"forget": row, "retain": row}, the retain row drawn at random, as open-unlearning's dataset has them."""

    def __init__(self, count=6, prompt=2, lengths=(9, 12), vocab=64):
        draw = torch.Generator().manual_seed(3)
        self.forget, self.retain = (
            [self.row(torch.randint(3, vocab, (lengths[i % 2],), generator=draw), prompt) for i in range(count)]
            for _ in range(2)
        )

    @staticmethod
    def row(ids, prompt):
        labels = ids.clone()
        labels[:prompt] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def __len__(self):
        return len(self.forget)

    def __getitem__(self, i):
        return {"forget": self.forget[i], "retain": self.retain[int(torch.randint(len(self.retain), ()))]}


def made(method, tmp_path, rows=None, arguments=(), **keywords):
    torch.manual_seed(0)
    given = {"per_device_train_batch_size": 2, "save_strategy": "no", **dict(arguments)}
    args = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, max_grad_norm=0.0, logging_steps=1, **given
    )
    trainer = method(model=tiny_olmoe(), args=args, train_dataset=rows or Rows(), **keywords)
    trainer.prepare()
    with torch.no_grad():
        # away from the reference, where NPO's loss would be a constant
        for p in trainer.model.parameters():
            p.add_(0.03 * torch.randn_like(p))
    return trainer


def one_batch(trainer, count=4):
    rows = trainer.train_dataset
    return trainer.data_collator([{"forget": rows.forget[i], "retain": rows.retain[-1 - i]} for i in range(count)])


def logits(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()


def token_nll(model, batch):
    """NLL [B, S - 1] of each next token, 0 where its label is -100, and where it is not."""
    labels = batch["labels"][:, 1:]
    values = -log_softmax(logits(model, batch)[:, :-1], -1).gather(2, labels.clamp_min(0)[..., None])[..., 0]
    return values * (labels != -100), labels != -100


def mean_nll(model, batch):
    values, mask = token_nll(model, batch)
    return values.sum() / mask.sum()


class Paired(Rows):
    """Rows whose retain partner is not drawn."""

    def __getitem__(self, i):
        return {"forget": self.forget[i], "retain": self.retain[i]}
