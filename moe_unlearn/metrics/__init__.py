"""Measure what a model remembers, what it can still do, and what it gives away."""

from moe_unlearn.metrics.choices import continuation_logprobs, evaluate_choices, multiple_choice
from moe_unlearn.metrics.completions import Classifier, CompletionSettings, evaluate_completions
from moe_unlearn.metrics.conventions import LIKE, Conventions, like
from moe_unlearn.metrics.evaluate import evaluate, min_k_auc
from moe_unlearn.metrics.gibberish import GibberishRate, gibberish_rate, repetition
from moe_unlearn.metrics.harness import harness, write_task
from moe_unlearn.metrics.memorization import (
    Continuation,
    cloze_spans,
    continuations,
    exact_memorization,
    extraction,
    extraction_each,
    extraction_strength,
    knowmem,
    knowmem_each,
    verbmem,
    verbmem_each,
)
from moe_unlearn.metrics.muse import MuseData, MuseSettings, evaluate_muse
from moe_unlearn.metrics.privacy import auc, membership_auc, min_k, nll, privleak, rel_diff
from moe_unlearn.metrics.relearning import RelearningCurve, relearning_attack
from moe_unlearn.metrics.results import Evaluation, ReferenceRun
from moe_unlearn.metrics.routing import Routes, RoutingChange, routes, routing_change, routing_drift
from moe_unlearn.metrics.rwku import RwkuData, RwkuSettings, evaluate_rwku
from moe_unlearn.metrics.scoring import TokenScores, context_length, evaluating, greedy, sampled, token_scores
from moe_unlearn.metrics.side_effects import SideEffects, side_effects
from moe_unlearn.metrics.tofu import TofuData, TofuSettings, evaluate_tofu, kolmogorov_smirnov

__all__ = [
    "Classifier",
    "CompletionSettings",
    "Continuation",
    "Conventions",
    "Evaluation",
    "GibberishRate",
    "LIKE",
    "MuseData",
    "MuseSettings",
    "ReferenceRun",
    "RelearningCurve",
    "Routes",
    "RoutingChange",
    "RwkuData",
    "RwkuSettings",
    "SideEffects",
    "TofuData",
    "TofuSettings",
    "TokenScores",
    "auc",
    "cloze_spans",
    "context_length",
    "continuations",
    "continuation_logprobs",
    "evaluate",
    "evaluate_choices",
    "evaluate_completions",
    "evaluate_muse",
    "evaluate_rwku",
    "evaluate_tofu",
    "evaluating",
    "exact_memorization",
    "extraction",
    "extraction_each",
    "extraction_strength",
    "gibberish_rate",
    "greedy",
    "harness",
    "knowmem",
    "knowmem_each",
    "like",
    "kolmogorov_smirnov",
    "membership_auc",
    "min_k",
    "min_k_auc",
    "multiple_choice",
    "nll",
    "privleak",
    "rel_diff",
    "relearning_attack",
    "repetition",
    "routes",
    "routing_change",
    "routing_drift",
    "sampled",
    "side_effects",
    "token_scores",
    "verbmem",
    "verbmem_each",
    "write_task",
]
