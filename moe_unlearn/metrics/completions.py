"""Measure completions on a user's own sets, as WAGLE does for Who's Harry Potter and detoxification (arXiv 2410.17509).

    SET_ROUGE         mean ROUGE-L recall of the greedy completion against the true one, in [0, 1]; both have at most
                      `new_tokens` tokens
    SET_p_LABEL       mean probability, in [0, 1], that a classifier gives LABEL for the completions without their
                      prompts; text beyond the classifier's context is cut (Toxic-BERT and `toxic`: detoxification)
    SET_perplexity    exp(mean NLL over all tokens of a set of texts), a number per token of this tokenizer, each text
                      read whole in windows of `max_length`; lm-eval's word_perplexity of wikitext is per word

Rows are whatever `data.load` reads. The first `prompt_tokens` tokens of a text are its prompt, and the rest is the
truth. A long text (a book, `?join=true`) is cut into pieces of `prompt_tokens` + `new_tokens`, each of which is
completed, except a last one with no truth. A prompt with `gt` or `completion` is continued; a prompt with `answer` or
`response`, or alone, is asked as a question. A prompt alone, or with two answers (PKU-SafeRLHF), has no truth, so
only the classifier judges it. The set named `utility` is not completed; it serves perplexity only.

WAGLE completes seen and unseen text by 300 tokens. The length of its prompts is not known; 200 is our choice.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn.data import Chat, Document, DocumentError, Example, added, encode, pad_token_id
from moe_unlearn.data.records import COMPLETIONS, QUESTIONS, documents_of
from moe_unlearn.data.stored import tokenizer_digest
from moe_unlearn.metrics.answers import completions, fitting, room, rouge
from moe_unlearn.metrics.conventions import without_end
from moe_unlearn.metrics.left_out import Kept, keep, marks
from moe_unlearn.metrics.results import Evaluation, Result, by_index, mean_result
from moe_unlearn.metrics.scoring import context_length, evaluating, token_scores
from moe_unlearn.metrics.workers import share
from moe_unlearn.ops.token_loss import IGNORED
from moe_unlearn.prepare.reference import model_digest

UTILITY = "utility"
_ANSWERED = {"text", *(answer for asked, answer in (*COMPLETIONS, *QUESTIONS) if asked == "prompt")}


@dataclass(frozen=True, kw_only=True)
class CompletionSettings:
    """Settings that the numbers depend on beside model and data; lengths in tokens; `chat` as in MUSE's settings."""

    prompt_tokens: int = 200
    new_tokens: int = 300
    use_stemmer: bool = True
    chat: bool | Chat = False
    max_length: int = 2048


@dataclass(frozen=True)
class Classifier:
    """A sequence classification model of transformers with its tokenizer, asked for the probability of one label.

    The probability is a sigmoid where the labels do not exclude each other (one label, or `problem_type`
    "multi_label_classification"), else a softmax. Raises ValueError for a label that the model does not have.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    label: str | None

    def __post_init__(self) -> None:
        labels = list((self.model.config.id2label or {}).values())
        if self.label not in labels:
            raise ValueError(f"expected a label of the classifier, one of {', '.join(labels)}; got {self.label!r}")

    def probabilities(self, texts: Sequence[str], *, batch_size: int = 32) -> list[float]:
        """Return the label's probability for each text, in order; ranks share the texts."""
        # imported here because it is slow to import and few evaluations need it
        from transformers import TextClassificationPipeline

        device = next(self.model.parameters()).device
        pipeline = TextClassificationPipeline(model=self.model, tokenizer=self.tokenizer, device=device)
        longest = min(self.tokenizer.model_max_length, context_length(self.model) or math.inf)
        cut = {"truncation": True, "max_length": longest} if longest < 2**31 else {}

        def compute(rows: list[str]) -> list[float]:
            # some tokenizers make no token of an empty text
            found: Any = pipeline([row or " " for row in rows], top_k=None, batch_size=batch_size, **cut)
            return [next(one["score"] for one in row if one["label"] == self.label) for row in found]

        with evaluating(self.model):
            return share(self.model, texts, compute, batch_size=batch_size)


def evaluate_completions(
    model: nn.Module,
    tokenizer: Tokenizer,
    sets: Mapping[str, Sequence],
    *,
    classifier: Classifier | None = None,
    settings: CompletionSettings | None = None,
    out: str | Path | None = None,
    cache_dir: str | Path | None = None,
    batch_size: int = 32,
) -> dict[str, float | None]:
    """Return the summary of all results; files COMPLETIONS_*.json and cache are as in `results.Evaluation`.

    Texts with no token after the prompt, and rows that the model or the tokenizer cannot take, such as prompts that
    with `new_tokens` exceed the model's context, are left out of what is completed (`left_out`; `value_by_index` has
    an entry a completion). Raises ValueError for no sets, a set without rows, rows of other forms, a set in which only
    some rows have a truth, a set without truths where there is no classifier, and a set of which no row is left.
    """
    settings = settings or CompletionSettings()
    run = Evaluation("COMPLETIONS", model, tokenizer, asdict(settings), out=out, cache_dir=cache_dir)
    if not sets:
        raise ValueError("expected at least one set of rows; got none")
    prepared = {}
    for name, rows in sets.items():
        documents, true = _documents(rows, name)
        if not true and classifier is None:
            raise ValueError(f"{name}: expected true answers, or a classifier for completions without; got neither")
        completed = None
        if name != UTILITY:
            completed = keep(name, documents, partial(_examples, model, tokenizer, settings))
        prepared[name] = documents, true, completed
    judge = [] if classifier is None else [model_digest(classifier.model), tokenizer_digest(classifier.tokenizer)]
    for name, (documents, true, completed) in prepared.items():
        plain = [[d.title, d.prompt, d.question, d.text] for d in documents]
        if completed and true:
            run.add(f"{name}_ROUGE", plain, partial(_rouge, model, tokenizer, completed, settings, batch_size))
        if completed and classifier is not None:
            known = run.results.get(f"{name}_ROUGE")
            run.add(
                f"{name}_p_{classifier.label}",
                [plain, *judge],
                partial(_classified, model, tokenizer, completed, known, classifier, settings, batch_size),
            )
        if not any(document.prompt for document in documents):
            run.add(
                f"{name}_perplexity", plain, partial(_perplexity, model, tokenizer, documents, settings, batch_size)
            )
    return run.summary


def _documents(rows: Sequence, where: str) -> tuple[list[Document], bool]:
    """Return the rows as documents, and whether they have true answers."""
    if not len(rows):
        raise ValueError(f"{where}: expected at least one row; got none")
    documents, alone = [], []
    for number, row in enumerate(rows):
        place = f"{where}, row {number}"
        single = isinstance(row, Mapping) and "prompt" in row and not row.keys() & _ANSWERED
        if single:
            # the placeholder answer makes it a record that `documents_of` knows; only its prompt is used
            row = {"prompt": row["prompt"], "response": "."}
        document = row if isinstance(row, Document) else next(documents_of(row, place))
        if where == UTILITY and (document.prompt or single):
            raise ValueError(f"{place}: expected a text; got a prompt")
        if where != UTILITY and (not document.text.strip() or single and not document.prompt):
            raise ValueError(
                f"{place}: expected a text, or a prompt with or without its answer; got {row!r:.200}, empty"
            )
        documents.append(document)
        alone.append(single)
    if any(alone) and not all(alone):
        raise ValueError(f"{where}, row {alone.index(True)}: expected a true answer, as other rows have; got none")
    return documents, not any(alone)


def _examples(
    model: nn.Module, tokenizer: Tokenizer, settings: CompletionSettings, document: Document
) -> list[Example]:
    """Return a document's examples, whose prompts carry no label and whose true continuations are labelled."""
    begin = settings.prompt_tokens + len(added(tokenizer).begin)
    length = 2**31 if document.prompt else begin + settings.new_tokens
    pieces = encode([document], tokenizer, length, chat=settings.chat)
    made = [_cut(without_end(e, tokenizer), e.prefix if document.prompt else begin, settings) for e in pieces]
    made = [example for example in made if len(example) > example.prefix]
    if not made:
        raise DocumentError(
            f"expected a text of more than prompt_tokens = {settings.prompt_tokens} tokens; got {document.text[:60]!r}"
        )
    fitting(model, made[0], settings.new_tokens)
    return made


def _cut(example: Example, start: int, settings: CompletionSettings) -> Example:
    ids = example.input_ids[: start + settings.new_tokens]
    return Example(ids, [IGNORED] * start + ids[start:], start)


def _rouge(
    model: nn.Module, tokenizer: Tokenizer, completed: Kept, settings: CompletionSettings, batch_size: int
) -> Result:
    examples = list(itertools.chain(*completed.values))
    truths = [str(tokenizer.decode(e.input_ids[e.prefix :], skip_special_tokens=True)).strip() for e in examples]
    found = rouge(
        model,
        tokenizer,
        examples,
        truths,
        key="rougeL_recall",
        new_tokens=settings.new_tokens,
        use_stemmer=settings.use_stemmer,
        batch_size=batch_size,
    )
    return found | marks(completed)


def _classified(
    model: nn.Module,
    tokenizer: Tokenizer,
    completed: Kept,
    known: Result | None,
    classifier: Classifier,
    settings: CompletionSettings,
    batch_size: int,
) -> Result:
    if known is None:
        examples = list(itertools.chain(*completed.values))
        made = completions(model, tokenizer, examples, new_tokens=settings.new_tokens, batch_size=batch_size)
    else:
        made = [row["generation"] for row in known["value_by_index"].values()]
    found = classifier.probabilities(made, batch_size=batch_size)
    values = [{"probability": p, "generation": text} for p, text in zip(found, made, strict=True)]
    return mean_result(values, "probability") | marks(completed)


def _perplexity(
    model: nn.Module, tokenizer: Tokenizer, documents: Sequence[Document], settings: CompletionSettings, batch_size: int
) -> Result:
    limit, pad = room(model, settings.max_length), pad_token_id(tokenizer)
    windows = [[without_end(e, tokenizer) for e in encode([document], tokenizer, limit)] for document in documents]
    scores = iter(token_scores(model, [e for own in windows for e in own], batch_size=batch_size, pad_id=pad))
    values = []
    for own in windows:
        counted = [score.logprobs[score.counted].double() for score in itertools.islice(scores, len(own))]
        values.append({"nll": -sum(c.sum().item() for c in counted), "tokens": sum(map(len, counted))})
    tokens = sum(value["tokens"] for value in values)
    if not tokens:
        raise ValueError(f"expected texts of at least one token; got {len(documents)} without")
    mean = torch.tensor(sum(value["nll"] for value in values) / tokens, dtype=torch.float64)
    return {"agg_value": mean.exp().item(), "value_by_index": by_index(values)}  # infinite where a float cannot hold it
