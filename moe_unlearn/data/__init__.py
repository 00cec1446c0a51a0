"""Corpora, tokenizer, examples, batches and forget/retain pairs."""

from moe_unlearn.data.builtin import load_builtin
from moe_unlearn.data.corpus import Corpus, Document, drop_shared_runs
from moe_unlearn.data.files import read_documents
from moe_unlearn.data.pairs import ForgetRetainDataset, PairCollator, overlap, refusals, side_batches
from moe_unlearn.data.tokenize import (
    Example,
    batches,
    collate,
    encode,
    generator,
    pad_token_id,
    train_tokenizer,
)

__all__ = [
    "Corpus",
    "Document",
    "Example",
    "ForgetRetainDataset",
    "PairCollator",
    "batches",
    "collate",
    "drop_shared_runs",
    "encode",
    "generator",
    "load_builtin",
    "overlap",
    "pad_token_id",
    "read_documents",
    "refusals",
    "side_batches",
    "train_tokenizer",
]
