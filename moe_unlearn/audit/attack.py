"""The one form of every attack: what it is given, what it gives back, and the scores that all of them share.

An attack gets a `Target` and returns an `Outcome`: scores of each document of each side, under each variant of the
attack. What they mean is decided elsewhere (`verdict`), and the same attack on a retrained model gives its null.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn.data import Example, pad_token_id
from moe_unlearn.metrics.memorization import exact_memorization
from moe_unlearn.metrics.routing import Routes
from moe_unlearn.metrics.scoring import TokenScores, token_scores
from moe_unlearn.ranks import sharded

SIDES = ("forget", "retain", "holdout")
Values = list[float | None]  # one of each document; None where it cannot be measured
Sides = dict[str, Values]  # by side
CONTENT, MEMBERSHIP = "content", "membership"


@dataclass(frozen=True)
class Score:
    """A number that is larger the more a model shows of a document.

    Of `kind` "content" means over documents are compared, of "membership" areas under ROC curves. `least` is the
    smallest original memory, in its unit, of which shares are taken.
    """

    title: str
    unit: str
    kind: str = CONTENT
    least: float = 0.05


SCORES = {
    "loglik": Score("log-likelihood", "nats a token", least=0.1),
    "recall": Score("next tokens right", "share of tokens"),
    "verbmem": Score("VerbMem", "ROUGE-L F1"),
    "knowmem": Score("KnowMem", "share of words"),
    "extraction": Score("extraction", "share of documents"),
    "lens": Score("rank of the next token", "minus its logarithm", least=0.1),
    "loss": Score("membership by loss", "area under ROC", MEMBERSHIP),
    "min_k": Score("membership by min-k (PrivLeak)", "area under ROC", MEMBERSHIP),
    "min_k_plus_plus": Score("membership by min-k++", "area under ROC", MEMBERSHIP),
    "zlib": Score("membership by zlib", "area under ROC", MEMBERSHIP),
    "reference": Score("membership by reference", "area under ROC", MEMBERSHIP),
    "probe": Score("a probe of hidden states", "area under ROC", MEMBERSHIP),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that scores depend on beside models and documents.

    Prompts are as in `metrics.verbmem`. An attacker relearns with `relearn_steps` steps of AdamW at `relearn_lr`, on
    batches of `relearn_batch` documents, and samples `samples` answers.
    """

    prompt_tokens: int = 16
    new_tokens: int = 64
    relearn_steps: int = 20
    relearn_lr: float = 1e-4
    relearn_batch: int = 8
    samples: int = 8
    experts: int = 64  # of all layers, whose former selves are put back one by one
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Target:
    """A model under attack: it is left bit for bit as it came, in mode, gradients and random state too.

    `rows` has the documents by side. `before` is the model before unlearning, on any device; attacks that need none
    take no notice of it. `routes` are those of its tokens by side, empty without experts or where no attack asks for
    them. `reference` is a retrained model's mean log-likelihood of the rows by side, if there is one.
    """

    model: nn.Module
    tokenizer: Tokenizer
    rows: Mapping[str, Sequence[Example]]
    before: nn.Module
    settings: Settings = field(default_factory=Settings)
    routes: Mapping[str, Routes] = field(default_factory=dict)
    reference: Sides | None = None
    batch_size: int = 8

    @property
    def pad_id(self) -> int:
        """Return the token id that fills rows up."""
        return pad_token_id(self.tokenizer)

    def scored(self, rows: Sequence[Example], *, standard: bool = False) -> list[TokenScores]:
        """Return the `token_scores` of rows."""
        return token_scores(self.model, rows, batch_size=self.batch_size, pad_id=self.pad_id, standard=standard)

    def read(self) -> dict[str, Sides]:
        """Return `loglik` and `recall` of all documents, in one forward pass each: score -> side -> values."""
        return by_score({side: reading(self.scored(rows)) for side, rows in self.rows.items()})


@dataclass(frozen=True)
class Variant:
    """Scores, by name and side, under one variant of an attack; a verdict rests on them only where it is `judged`."""

    label: str
    scores: dict[str, Sides]
    judged: bool = True


@dataclass(frozen=True)
class Outcome:
    """Holds what an attack found: its variants by name, and `more` for its part of the report; all JSON values."""

    variants: dict[str, Variant]
    more: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values of which `of` makes the same outcome again."""
        return asdict(self)

    @classmethod
    def of(cls, plain: dict[str, Any]) -> "Outcome":
        """Return the outcome that `to_dict` was made of."""
        return cls({name: Variant(**own) for name, own in plain["variants"].items()}, plain["more"])


@dataclass(frozen=True)
class Attack:
    """An attack: its name, what the report says of it, what it does, and why it cannot be made of some targets.

    Those that change weights or read them all need them whole on every rank.
    """

    name: str
    title: str
    about: str
    run: Callable[[Target], Outcome]
    whole: bool = True
    refuses: Callable[[Target], str] = lambda target: ""

    def why_not(self, target: Target) -> str:
        """Return why the attack cannot be made, "" if it can."""
        if self.whole and sharded(target.model):
            return "it needs whole weights on every rank"
        return self.refuses(target)


def reading(scored: Sequence[TokenScores]) -> dict[str, Values]:
    """Return each document's mean log-likelihood of its labelled tokens and the share of them that are most likely."""
    return {
        "loglik": [own.logprobs[own.counted].double().mean().item() for own in scored],
        "recall": [exact_memorization(own) for own in scored],
    }


def mean(values: Values) -> float:
    """Return the mean over the documents that could be measured, NaN if there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def by_score(sides: Mapping[str, Mapping[str, Values]]) -> dict[str, Sides]:
    """Return side -> score -> values as score -> side -> values, without values where a side has none."""
    names = dict.fromkeys(score for scores in sides.values() for score in scores)
    return {score: {side: scores.get(score, []) for side, scores in sides.items()} for score in names}
