"""Compute ROUGE of texts in any script with the `rouge-score` package."""

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from moe_unlearn.data.scripts import unicode_words

#: how results describe the words that ROUGE compared
TOKENIZER = "rouge-score's for ASCII text; else Unicode words, single characters in scripts without spaces, and symbols"


class UnicodeTokenizer:
    """Splits text into the words that `RougeScorer(tokenizer=...)` compares.

    ASCII text has the words of `rouge-score`'s own tokenizer, stemmed if asked. That tokenizer deletes every other
    letter: a Russian or Chinese text would have no words at all, and "café" would be "caf". So other text is brought
    to one form (NFKC), lower-cased and cut by `unicode_words`. ASCII words among these are treated as above; other
    words are not stemmed.
    """

    def __init__(self, use_stemmer: bool):
        from rouge_score.tokenizers import DefaultTokenizer

        self._ascii: Callable[[str], list[str]] = DefaultTokenizer(use_stemmer).tokenize

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text, in order."""
        if text.isascii():
            return self._ascii(text)
        words: list[str] = []
        for word, _, _ in unicode_words(unicodedata.normalize("NFKC", text).lower()):
            words += self._ascii(word) if word.isascii() else [word]
        return words


def rouge_scorer(kinds: Sequence[str], *, use_stemmer: bool) -> Any:
    """Return a `RougeScorer` of these kinds ("rouge1", "rougeL") with `UnicodeTokenizer`."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(kinds), tokenizer=UnicodeTokenizer(use_stemmer))
