"""What a model remembers, what it still can, and what it gives away."""

from moe_unlearn.metrics.evaluate import NAMES, evaluate
from moe_unlearn.metrics.memorization import cloze_spans, extraction, knowmem, verbmem
from moe_unlearn.metrics.privacy import auc, membership_auc, min_k, nll, privleak, routing_drift
from moe_unlearn.metrics.scoring import TokenScores, evaluating, greedy, token_scores

__all__ = [
    "NAMES",
    "TokenScores",
    "auc",
    "cloze_spans",
    "evaluate",
    "evaluating",
    "extraction",
    "greedy",
    "knowmem",
    "membership_auc",
    "min_k",
    "nll",
    "privleak",
    "routing_drift",
    "token_scores",
    "verbmem",
]
