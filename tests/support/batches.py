"""Random batches as transformers has them: right-padded, some labels ignored, lengths not equal."""

import torch


def random_batch(vocab_size: int, rows: int = 4, length: int = 12, *, seed: int = 0, prompt: int = 2) -> dict:
    """Rows of 60-100 % of `length` tokens; the first `prompt` labels of each row carry no loss."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab_size, (rows, length), generator=generator)
    lengths = torch.randint(int(0.6 * length), length + 1, (rows,), generator=generator)
    lengths[0] = length
    attention = (torch.arange(length) < lengths[:, None]).long()
    labels = ids.masked_fill(attention == 0, -100)
    labels[:, :prompt] = -100
    return {"input_ids": ids * attention, "attention_mask": attention, "labels": labels}


def random_batches(vocab_size: int, count: int = 3, *, seed: int = 0, **keywords) -> list[dict]:
    """`count` different batches."""
    return [random_batch(vocab_size, seed=seed * 1000 + i, **keywords) for i in range(count)]


def with_refusals(batch: dict, *, seed: int = 0) -> dict:
    """Add preference rows of another length, as IDK-DPO needs them."""
    rows = len(batch["input_ids"])
    refusal = random_batch(int(batch["input_ids"].max()), rows, 9, seed=seed + 77)
    return batch | {f"idk_{key}": value for key, value in refusal.items()}
