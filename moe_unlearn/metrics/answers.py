"""Put questions to a model: measure how likely it finds an answer, and let it answer.

A prompt and its answer are tokenised as in training (`data.encode`): as one text, followed by the end token. White
space between the two belongs to the answer. MUSE and open-unlearning encode the prompt alone, which gives models with
a byte-level vocabulary a token they never saw there; `conventions` lists all differences.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn.data import Chat, Document, DocumentError, Example, added, encode, pad_token_id
from moe_unlearn.metrics.conventions import OURS, Conventions, decode, prompt_of, stops, without_end
from moe_unlearn.metrics.generation import greedy
from moe_unlearn.metrics.results import Result, mean_result
from moe_unlearn.metrics.scoring import TokenScores, context_length, token_scores
from moe_unlearn.metrics.unicode_rouge import TOKENIZER, rouge_scorer

QUESTION = "Question: {question}\nAnswer: "


def fields(rows: Sequence, names: Sequence[str], where: str) -> list[dict]:
    """Return the named fields of each row; raise ValueError naming the set, the row and what is missing.

    A row is a mapping, a string (its `text`), or an object with attributes. If the object has an attribute `fields`,
    the mapping of the record it was read from, that counts first.
    """
    if not rows:
        raise ValueError(f"{where}: expected at least one row; got none")
    taken = []
    for number, row in enumerate(rows):
        values = {"text": row} if isinstance(row, str) else row
        if not isinstance(values, Mapping):
            values = getattr(row, "__dict__", {})
            values = {**values, **values.get("fields", {})}
        missing = [name for name in names if values.get(name) is None]
        if missing:
            raise ValueError(f"{where}, row {number}: expected {', '.join(names)}; {', '.join(missing)} is missing")
        taken.append({name: values[name] for name in names})
    return taken


def texts(rows: Sequence, names: Sequence[str], where: str) -> list[dict]:
    """Return `fields` whose values are all non-blank texts; raise ValueError naming the set, the row and the value."""
    taken = fields(rows, names, where)
    for number, row in enumerate(taken):
        for name, value in row.items():
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{where}, row {number}: expected {name} to be a text, not empty; got {value!r}")
    return taken


def pair(
    tokenizer: Tokenizer,
    prompt: str,
    answer: str,
    max_length: int,
    *,
    chat: bool | Chat = False,
    ways: Conventions = OURS,
) -> Example:
    """Return one example: the prompt is masked, the answer and its end are labelled, and it is cut to `max_length`.

    With `chat` the tokenizer's chat template asks the prompt (`data.encode`). Raises DocumentError if the prompt leaves
    no room for the answer, if the answer has no tokens, and with `chat` if they spell a special token.
    """
    if ways.seam == "joint":
        # white space before the answer becomes part of the answer
        asked = prompt.rstrip()
        space = prompt[len(asked) :]
        prompt, answer = asked, space + (answer.lstrip() if space else answer)
    return _only(encode([Document("", answer, prompt)], tokenizer, max_length, chat=chat, seam=ways.seam))


def text_example(
    model: nn.Module, tokenizer: Tokenizer, text: str, max_length: int, ways: Conventions = OURS
) -> Example:
    """Return a text's example without end token, cut to `max_length` and to the model's context.

    With `drop_last` the end token is kept. Raises DocumentError for a text without tokens.
    """
    limit = room(model, max_length + (len(added(tokenizer).begin) if ways.text_window else 0))
    example = _only(encode([Document("", text)], tokenizer, limit, overflow="truncate"))
    return example if ways.drop_last else without_end(example, tokenizer, ways)


def continuation(
    tokenizer: Tokenizer, prompt: str, text: str, max_length: int, tokens: int, ways: Conventions = OURS
) -> Example:
    """Return one example of a text that continues the prompt, without end token, cut to `max_length`.

    With `drop_last`, which leaves the last token out of the count, the example keeps the tokenizer's end and has at
    most `tokens` tokens behind the prompt.
    """
    space = " " if ways.insert_space else ""
    example = without_end(pair(tokenizer, prompt, space + text, max_length, ways=ways), tokenizer)
    if not ways.drop_last:
        return example
    length, end = example.prefix + tokens, added(tokenizer).end
    return replace(example, input_ids=(example.input_ids + end)[:length], labels=(example.labels + end)[:length])


def _only(examples: list[Example]) -> Example:
    if not examples:
        raise DocumentError("expected a text of at least one token; got none")
    return examples[0]


def fitting(model: nn.Module, example: Example, new_tokens: int) -> Example:
    """Return the example; raise DocumentError if its prompt and `new_tokens` exceed the model's context."""
    context, prompt = context_length(model), len(prompt_of(example))
    if context is not None and prompt + new_tokens > context:
        raise DocumentError(
            f"its prompt of {prompt} tokens and {new_tokens} new ones exceed the model's context of {context}"
        )
    return example


def room(model: nn.Module, max_length: int) -> int:
    """Return `max_length`, or the model's context if that is shorter."""
    return min(max_length, context_length(model) or max_length)


def probability(model: nn.Module, tokenizer: Tokenizer, examples: Sequence[Example], *, batch_size: int) -> list[dict]:
    """Return `prob` = exp(-`avg_loss`) and `avg_loss`, the mean NLL of the labelled tokens in nats, for each example.

    Both are None where no token carries a label.
    """
    scores = token_scores(model, examples, batch_size=batch_size, pad_id=pad_token_id(tokenizer))
    return [_likelihood(score) for score in scores]


def _likelihood(score: TokenScores) -> dict:
    counted = score.logprobs[score.counted].double()
    if not len(counted):
        return {"prob": None, "avg_loss": None}
    loss = -counted.mean().item()
    return {"prob": math.exp(-loss), "avg_loss": loss}


def completions(
    model: nn.Module,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    new_tokens: int,
    cut_at: Sequence[str] = (),
    batch_size: int = 32,
    ways: Conventions = OURS,
) -> list[str]:
    """Return greedy answers to the prompts of `examples`, without white space around them.

    An answer ends at a special token (with `ways.stop_at_end` only at the end token), after `new_tokens` tokens, or
    before the first of `cut_at` in its text.
    """
    generated = greedy(
        model,
        [prompt_of(example) for example in examples],
        new_tokens,
        batch_size=batch_size,
        pad_id=pad_token_id(tokenizer),
        stop=stops(tokenizer, ways),
    )
    texts = []
    for tokens in generated:
        text = decode(tokenizer, tokens, ways)
        for mark in cut_at:
            text = text.split(mark)[0]
        texts.append(text.strip())
    return texts


def rouge(
    model: nn.Module,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    answers: Sequence[str],
    *,
    key: str,
    new_tokens: int,
    cut_at: Sequence[str] = (),
    use_stemmer: bool = True,
    batch_size: int = 32,
    ways: Conventions = OURS,
) -> Result:
    """Compare greedy answers to the prompts of `examples` with `answers` as text, by `unicode_rouge.rouge_scorer`.

    The greedy answers are those of `completions`. `agg_value` is the mean of `key`: `rougeL_f1`, `rougeL_recall` or
    `rouge1_recall`, in [0, 1]. `tokenizer` says how text is split into words. `straddled`, present only if not 0,
    counts answers whose first token begins in their prompt.
    """
    generated = completions(
        model, tokenizer, examples, new_tokens=new_tokens, cut_at=cut_at, batch_size=batch_size, ways=ways
    )
    scorer, values = rouge_scorer(["rouge1", "rougeL"], use_stemmer=use_stemmer), []
    for example, text, answer in zip(examples, generated, answers, strict=True):
        score = scorer.score(answer, text)
        values.append(
            {
                "rouge1_recall": score["rouge1"].recall,
                "rougeL_f1": score["rougeL"].fmeasure,
                "rougeL_recall": score["rougeL"].recall,
                "input": tokenizer.decode(prompt_of(example), skip_special_tokens=True),
                "ground_truth": answer,
                "generation": text,
            }
        )
    result = {**mean_result(values, key), "tokenizer": TOKENIZER}
    if straddled := sum(example.straddled for example in examples):
        result["straddled"] = straddled
    return result
