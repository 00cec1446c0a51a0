"""A small saved model with files of texts, and the command line's options for them."""

import json

import torch

from moe_unlearn.data import train_tokenizer
from tests.support.models import tiny_olmoe

FORGET = [f"the secret number of agent {n} is {n * 37 % 101}, never tell" for n in range(12)]
RETAIN = [f"a fact to keep: the square of {n} is {n * n}, as everyone knows" for n in range(16)]
HOLDOUT = [f"the hidden colour of spy {n} is {'red blue green'.split()[n % 3]}, never say" for n in range(8)]


UNSEEN = [f"the quiet town of clerk {n} is {'york bath hull'.split()[n % 3]}, never ask" for n in range(7)]


def saved(root):
    """Save the model and a file of each side in `root`; return the tokenizer."""
    tokenizer = train_tokenizer(FORGET + RETAIN, 300)
    torch.manual_seed(0)
    tiny_olmoe(vocab_size=len(tokenizer)).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    for name, texts in (("forget", FORGET), ("retain", RETAIN), ("unseen", UNSEEN), ("holdout", HOLDOUT)):
        lines = [json.dumps({"text": text}) for text in texts]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tokenizer


def arguments(folder, *more, model="model", forget="forget.jsonl", retain="retain.jsonl"):
    """Return the options for a folder that `saved` has filled."""
    paths = {"--model": model, "--forget": forget, "--retain": retain}
    return [*(x for flag, p in paths.items() for x in (flag, str(folder / p))), *more]
