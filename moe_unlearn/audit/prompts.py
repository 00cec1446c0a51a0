"""Ask for the documents in other words: what is hidden from one prompt may answer another.

Every document is cut into a prefix, its prompt or its first half, and the rest. The model is asked for the rest behind

    longer prefix   three quarters of the document instead of a half; the rest is shorter
    other passages  two other documents of the same side before it, as somebody has them who quotes
    changed case    the prefix in upper case
    typos           every eighth letter of the prefix swapped with the next one
    template        "Complete this text: ... Continuation:" around the prefix
    best of n       the prefix as it is, n answers drawn at temperature 1, of which the one most like the truth counts

Scores are those of the true rest, token by token, under that prefix, but of drawn answers the largest ROUGE-L F1. The
tokens of the rest stay the document's own. What does not fit the model's context is cut on the left.
"""

import random
from collections.abc import Callable, Sequence
from functools import partial

from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn.audit.attack import Attack, Outcome, Sides, Target, Values, Variant, by_score, reading
from moe_unlearn.data import Example, special_ids
from moe_unlearn.metrics.generation import sampled
from moe_unlearn.metrics.scoring import context_length
from moe_unlearn.metrics.unicode_rouge import rouge_scorer
from moe_unlearn.ops.token_loss import IGNORED

_PASSAGES = 2
_EVERY = 8  # letters between two typos
#: makes what is asked of the documents of a side and the number of one of them
Form = Callable[[Sequence[Example], int], Example]
_BEFORE, _BEHIND = "Complete this text: ", "\nContinuation:"


def _run(target: Target) -> Outcome:
    tokenizer, seed = target.tokenizer, target.settings.seed
    forms: dict[str, tuple[str, Form]] = {
        "longer prefix": ("behind three quarters of the document", partial(_plain, share=0.75)),
        "other passages": ("behind other passages of its set", _behind_others),
        "changed case": ("behind its beginning in upper case", partial(_worded, tokenizer, str.upper)),
        "typos": ("behind its beginning with typos", partial(_worded, tokenizer, partial(_misspelt, seed=seed))),
        "template": ("asked to complete its beginning", partial(_worded, tokenizer, _templated)),
    }
    variants = {}
    for name, (label, form) in forms.items():
        sides = {side: _scores(target, rows, form) for side, rows in target.rows.items()}
        variants[name] = Variant(label, by_score(sides))
    count = target.settings.samples
    drawn: Sides = {side: _best(target, rows) for side, rows in target.rows.items()}
    variants["best of n"] = Variant(f"the best of {count} drawn answers", {"verbmem": drawn})
    return Outcome(variants)


def _cut(example: Example, share: float = 0.5) -> int:
    """Return where the prefix of a document ends: behind its prompt, and a share of it where that is longer."""
    return min(max(example.prefix, int(share * len(example)), 1), len(example) - 1)


def _asked(prefix: Sequence[int], rest: Sequence[int]) -> Example:
    return Example([*prefix, *rest], [*[IGNORED] * len(prefix), *rest], len(prefix))


def _plain(rows: Sequence[Example], number: int, share: float = 0.5) -> Example:
    ids = rows[number].input_ids
    at = _cut(rows[number], share)
    return _asked(ids[:at], ids[at:])


def _behind_others(rows: Sequence[Example], number: int) -> Example:
    others = [rows[(number + i) % len(rows)].input_ids for i in range(1, 1 + min(_PASSAGES, len(rows) - 1))]
    own = _plain(rows, number)
    quoted = [token for ids in others for token in ids]
    return _asked([*quoted, *own.input_ids[: own.prefix]], own.input_ids[own.prefix :])


def _worded(tokenizer: Tokenizer, change: Callable[[str], str], rows: Sequence[Example], number: int) -> Example:
    """Return a document whose prefix is spelt in another way, with the special tokens at its head as they were."""
    own, special = _plain(rows, number), special_ids(tokenizer)
    prefix = own.input_ids[: own.prefix]
    head = next((i for i, token in enumerate(prefix) if token not in special), len(prefix))
    text = change(str(tokenizer.decode(prefix[head:])))
    spelt = tokenizer(text, add_special_tokens=False)["input_ids"]
    return _asked([*prefix[:head], *spelt], own.input_ids[own.prefix :])


def _misspelt(text: str, seed: int) -> str:
    letters, draw = list(text), random.Random(seed)
    for start in range(0, len(letters) - 1, _EVERY):
        at = min(start + draw.randrange(_EVERY), len(letters) - 2)
        letters[at], letters[at + 1] = letters[at + 1], letters[at]
    return "".join(letters)


def _templated(text: str) -> str:
    return f"{_BEFORE}{text}{_BEHIND}"


def _scores(target: Target, rows: Sequence[Example], form: Form) -> dict[str, Values]:
    asked = [_fitting(form(rows, number), context_length(target.model)) for number in range(len(rows))]
    return reading(target.scored(asked))


def _fitting(example: Example, context: int | None) -> Example:
    """Return the last tokens of an example that a model's context holds."""
    over = 0 if context is None else max(0, len(example) - context)
    return Example(example.input_ids[over:], example.labels[over:], max(0, example.prefix - over))


def _best(target: Target, rows: Sequence[Example]) -> Values:
    """Return the largest ROUGE-L F1 of several drawn answers of each document."""
    settings, special = target.settings, special_ids(target.tokenizer)
    cut = [_plain(rows, number) for number in range(len(rows))]
    truths = [own.input_ids[own.prefix :][: settings.new_tokens] for own in cut]
    prompts = [own.input_ids[: own.prefix] for own in cut]
    context = context_length(target.model)
    longest = max(map(len, truths))
    if context is not None:
        prompts = [prompt[-(context - longest) :] for prompt in prompts]
    scorer, spelt = (
        rouge_scorer(["rougeL"], use_stemmer=False),
        partial(target.tokenizer.decode, skip_special_tokens=True),
    )
    best = [0.0] * len(rows)
    for draw in range(settings.samples):
        answers = sampled(target.model, prompts, longest, seed=settings.seed + draw, pad_id=target.pad_id, stop=special)
        for number, (truth, answer) in enumerate(zip(truths, answers, strict=True)):
            score = scorer.score(spelt(truth), spelt(answer[: len(truth)]))["rougeL"].fmeasure
            best[number] = max(best[number], score)
    return list(best)


ATTACK = Attack(
    "prompts",
    "Other prompts",
    "The documents are asked for behind longer, quoted, misspelt and other prefixes, and by drawing several answers.",
    _run,
    whole=False,
)
