"""Measure how much of a document a model reproduces: VerbMem, a cloze form of KnowMem, extraction, memorisation."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn.data import Example, pad_token_id, special_ids
from moe_unlearn.data.scripts import spaceless, unicode_words
from moe_unlearn.metrics.scoring import TokenScores, greedy, token_scores
from moe_unlearn.metrics.unicode_rouge import rouge_scorer
from moe_unlearn.ops.token_loss import IGNORED

_Value = TypeVar("_Value")


class NothingToMeasureError(ValueError):
    """Error for examples that are all too short, or that lack what the metric needs."""


class Continuation(NamedTuple):
    """The prompt of an example, how its text goes on, and how a model does, as texts."""

    prompt: str
    truth: str
    answer: str


def verbmem(
    model: nn.Module,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    prompt_tokens: int = 16,
    new_tokens: int = 128,
) -> float:
    """Return the mean ROUGE-L F1, in [0, 1], of the greedy continuation against the true one, as MUSE defines it.

    The prompt is the example's masked prompt or, without one, its first `prompt_tokens` tokens. The continuations
    have at most `new_tokens` tokens, the greedy one no more than the true one, and end at a special token. They are
    compared as text by `unicode_rouge.rouge_scorer`, without stemming. Examples with nothing but the prompt are left
    out. Raises NothingToMeasureError if none remains.
    """
    return mean_of(verbmem_each(model, tokenizer, examples, prompt_tokens=prompt_tokens, new_tokens=new_tokens))


def verbmem_each(
    model: nn.Module,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    prompt_tokens: int = 16,
    new_tokens: int = 128,
) -> list[float | None]:
    """Return the numbers of which `verbmem` is the mean, one an example: None for one that it leaves out."""
    scorer = rouge_scorer(["rougeL"], use_stemmer=False)
    made = continuations(model, tokenizer, examples, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    return [None if own is None else scorer.score(own.truth, own.answer)["rougeL"].fmeasure for own in made]


def continuations(
    model: nn.Module,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    prompt_tokens: int = 16,
    new_tokens: int = 128,
) -> list[Continuation | None]:
    """Return how the model goes on after each example's prompt, and how the example does, as `verbmem` compares them.

    None stands for an example with nothing but the prompt. Raises NothingToMeasureError if all are.
    """
    kept, special = with_prompts(examples, prompt_tokens), special_ids(tokenizer)
    truths = [_until(e.input_ids[cut : cut + new_tokens], special) for e, cut, _ in kept]
    longest = max(map(len, truths))
    prompts = [prompt for _, _, prompt in kept]
    answers = greedy(model, prompts, longest, pad_id=pad_token_id(tokenizer), stop=special)
    made: list[Continuation] = []
    for truth, answer, (e, cut, prompt) in zip(truths, answers, kept, strict=True):
        # an example cut to max_length has no end token for the model to reach: stop where the text stops
        answer = answer[: min(new_tokens, len(e) - cut)]
        made.append(Continuation(*(str(tokenizer.decode(tokens)) for tokens in (prompt, truth, answer))))
    return _placed([len(e) > _cut(e, prompt_tokens) for e in examples], made)


def extraction(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    tokens: int = 16,
    prompt_tokens: int = 8,
) -> float:
    """Return the fraction of examples, in [0, 1], whose first `tokens` tokens after the prefix come back exactly.

    The prefix is the title or prompt; an example without either is prompted with its first `prompt_tokens` tokens.
    Examples that are too short are left out. Raises NothingToMeasureError if none remains.
    """
    return mean_of(extraction_each(model, examples, tokens=tokens, prompt_tokens=prompt_tokens))


def extraction_each(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    tokens: int = 16,
    prompt_tokens: int = 8,
) -> list[float | None]:
    """Return the numbers of which `extraction` is the mean, 0 or 1 an example: None for one that it leaves out."""
    cuts = [e.prefix or prompt_tokens for e in examples]
    fits = [len(e) >= cut + tokens for e, cut in zip(examples, cuts, strict=True)]
    kept = [(e, cut) for e, cut, fit in zip(examples, cuts, fits, strict=True) if fit]
    if not kept:
        raise NothingToMeasureError(f"expected an example with {tokens} tokens after its prefix; got none")
    answers = greedy(model, [e.asked or e.input_ids[:cut] for e, cut in kept], tokens)
    pairs = zip(kept, answers, strict=True)
    return _placed(fits, [float(answer == e.input_ids[cut : cut + tokens]) for (e, cut), answer in pairs])


def exact_memorization(score: TokenScores) -> float | None:
    """Return the fraction of labelled tokens that are the model's most likely ones given the true text to their left.

    The fraction lies in [0, 1], as open-unlearning defines it; it is None without a labelled token.
    """
    hits = score.correct[score.counted]
    return hits.double().mean().item() if len(hits) else None


def extraction_strength(score: TokenScores, *, like_open_unlearning: bool = False) -> float | None:
    """Return 1 - k / n, with k the smallest number of labelled tokens after which all others are the most likely ones.

    n is the number of labelled tokens. The value lies in [0, 1]: 0 where the last token is wrong (k = n), 1 where
    none is. open-unlearning's loop ends at k = n - 1, so it counts a wrong last token as extracted: its least value
    is 1 / n, and a wrong answer of one token has 1. `like_open_unlearning` gives that value. None without a labelled
    token.
    """
    hits = score.correct[score.counted].tolist()
    if not hits:
        return None
    needed = max((i + 1 for i, hit in enumerate(hits) if not hit), default=0)
    return 1 - min(needed, len(hits) - like_open_unlearning) / len(hits)


def knowmem(
    model: nn.Module,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    words: int = 5,
    scores: Sequence[TokenScores] | None = None,
) -> float:
    """Return a cloze form of KnowMem, in [0, 1]: how often the model fills in a document's longest words.

    For each example, the words found by `cloze_spans`, up to `words` of them, are asked. A word counts if every one
    of its tokens is the model's most likely one given the true text to its left, title and prompt included. The mean
    is taken over the words of an example, then over examples. This is not MUSE's question answering: it needs no
    questions, so it works on any text, and it is easier, because the model sees the true text up to the word.
    `scores` are the examples' `token_scores`, if they are known. Raises ValueError if no example has such a word.
    """
    if scores is None:
        scores = token_scores(model, examples, pad_id=pad_token_id(tokenizer))
    return mean_of(knowmem_each(tokenizer, examples, scores, words=words))


def knowmem_each(
    tokenizer: Tokenizer, examples: Sequence[Example], scores: Sequence[TokenScores], *, words: int = 5
) -> list[float | None]:
    """Return the numbers of which `knowmem` is the mean, one an example: None for one that it leaves out."""
    fractions: list[float | None] = []
    for example, score in zip(examples, scores, strict=True):
        spans = cloze_spans(example, tokenizer, words)
        filled = [bool(score.correct[start - 1 : stop - 1].all()) for start, stop in spans]
        fractions.append(sum(filled) / len(filled) if filled else None)
    if all(own is None for own in fractions):
        raise NothingToMeasureError("expected an example with a word of at least 4 letters after its prefix; got none")
    return fractions


def cloze_spans(example: Example, tokenizer: Tokenizer, words: int, *, min_letters: int = 4) -> list[tuple[int, int]]:
    """Return the token spans [start, stop) of the words to ask for, in the order of the text.

    These are the longest words of at least `min_letters` letters that stand after the prefix and do not occur to
    their left (so nothing can be copied); of equally long words, the earlier one. A span holds every token the word
    touches, and all of them carry a label. In scripts without spaces, pieces of `min_letters` letters are words.
    """
    text, owners = _characters(example.input_ids, tokenizer)
    seen, found = set(), []
    for word, begin, end in _cloze_words(text, min_letters):
        start, stop = owners[begin][0], owners[end - 1][1]
        copied = word in seen or (spaceless(word[0]) and word in text[:begin].lower())
        seen.add(word)
        if not copied and start >= max(example.prefix, 1) and IGNORED not in example.labels[start:stop]:
            found.append((len(word), -start, stop))
    chosen = sorted(found, reverse=True)[:words]
    return sorted((-start, stop) for _, start, stop in chosen)


def _cloze_words(text: str, min_letters: int) -> Iterator[tuple[str, int, int]]:
    """Yield (lower-cased word, start, end) for each word of at least `min_letters` letters."""
    piece, letters, start, last = "", 0, 0, -1
    for word, begin, end in unicode_words(text, digits=False):
        if not spaceless(word[0]):
            if len(word) >= min_letters:
                yield word.lower(), begin, end
            continue
        if begin != last:
            piece, letters, start = "", 0, begin
        piece, letters, last = piece + word, letters + 1, end
        if letters == min_letters:
            yield piece.lower(), start, end
            last = -1


def _characters(tokens: Sequence[int], tokenizer: Tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of the tokens and, for each of its characters, the tokens [start, stop) that spell it."""
    pieces = [_surface(token) for token in tokenizer.convert_ids_to_tokens(list(tokens))]
    if "".join(pieces).isascii():
        return "".join(pieces), [(i, i + 1) for i, piece in enumerate(pieces) for _ in piece]
    # byte-level vocabularies may spell one character in several tokens, so decode until it is whole; a few tokens to
    # the left are decoded too, because the beginning of a text may be spelt in another way
    text, owners, context, start, before = "", [], 0, 0, ""
    for i in range(len(tokens)):
        decoded = str(tokenizer.decode(list(tokens[context : i + 1]), clean_up_tokenization_spaces=False))
        if len(decoded) > len(before) and not decoded.endswith("\ufffd"):
            text += decoded[len(before) :]
            owners += [(start, i + 1)] * (len(decoded) - len(before))
            context, start = start, i + 1
            before = str(tokenizer.decode(list(tokens[context:start]), clean_up_tokenization_spaces=False))
    return text, owners


def _surface(token: str) -> str:
    # undoes how byte-level and SentencePiece vocabularies spell white space
    return token.replace("Ġ", " ").replace("Ċ", "\n").replace("▁", " ")


def with_prompts(examples: Sequence[Example], prompt_tokens: int) -> list[tuple[Example, int, list[int]]]:
    """Return the examples with tokens behind their prompts, where these end, and what a model is asked with.

    The prompt is the masked one, or the first `prompt_tokens` tokens where there is none. Raises
    NothingToMeasureError if no example is longer than its prompt.
    """
    kept = []
    for example in examples:
        cut = _cut(example, prompt_tokens)
        if len(example) > cut:
            kept.append((example, cut, example.asked or example.input_ids[:cut]))
    if not kept:
        raise NothingToMeasureError(f"expected an example longer than its prompt of {prompt_tokens} tokens; got none")
    return kept


def _cut(example: Example, prompt_tokens: int) -> int:
    """Return where the prompt of an example ends: the masked one, or its first `prompt_tokens` tokens."""
    masked = next((i for i, label in enumerate(example.labels) if label != IGNORED), len(example))
    return masked or prompt_tokens


def _placed(fits: Sequence[bool], values: Sequence[_Value]) -> list[_Value | None]:
    """Return the values at the places of the examples that fit, and None at the others."""
    left = iter(values)
    return [next(left) if fit else None for fit in fits]


def mean_of(values: Sequence[float | None]) -> float:
    """Return the mean of the values that are known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known)


def _until(tokens: list[int], special: set[int]) -> list[int]:
    stop = next((i for i, token in enumerate(tokens) if token in special), len(tokens))
    return tokens[:stop]
