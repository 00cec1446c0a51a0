"""Examples, the packed row that transformers makes of them, and what tests of batches ask of both."""

import torch
from torch.nn.functional import cross_entropy
from transformers import DataCollatorWithFlattening

from moe_unlearn.data import Example
from tests.support.steps import VOCAB


def examples(*lengths, seed=0):
    """Examples of these lengths whose first label carries no loss, as in packed rows."""
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, VOCAB, (n,), generator=draw).tolist() for n in lengths]
    return [Example(ids, [-100, *ids[1:]], 0) for ids in rows]


def flattened(rows, **options):
    """transformers' packed row of some examples."""
    features = [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]
    return DataCollatorWithFlattening(return_tensors="pt", **options)(features)


def mean_nll(model, batch):
    """The model's loss of a batch with all that is given, without its rounding of logits to float32."""
    logits, labels = model(**batch).logits, batch["labels"]
    return float(cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


def check_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def offsets(*values, name="cu_seq_lens_q"):
    return {name: torch.tensor(values, dtype=torch.int32)}
