"""ROUGE of texts in any script, by the `rouge-score` package."""

import unicodedata
from collections.abc import Sequence

from moe_unlearn.data.scripts import unicode_words

#: what results say of the words that ROUGE compared
TOKENIZER = "rouge-score's for ASCII text; else Unicode words, single characters in scripts without spaces"


class UnicodeTokenizer:
    """The words that `RougeScorer(tokenizer=...)` compares.

    Text in ASCII has the words of `rouge-score`'s own tokenizer, stemmed if asked. That one deletes every other letter:
    a Russian or Chinese text has no words at all there, and "café" is "caf". So other text is first brought to one
    form (NFKC), then lower-cased and cut by `unicode_words`; words in ASCII among them are treated as above, others
    have no stemmer.
    """

    def __init__(self, use_stemmer: bool):
        from rouge_score.tokenizers import DefaultTokenizer

        self._ascii = DefaultTokenizer(use_stemmer)

    def tokenize(self, text: str) -> list[str]:
        """The words of a text, in order."""
        if text.isascii():
            return self._ascii.tokenize(text)
        words = []
        for word, _, _ in unicode_words(unicodedata.normalize("NFKC", text).lower()):
            words += self._ascii.tokenize(word) if word.isascii() else [word]
        return words


def rouge_scorer(kinds: Sequence[str], *, use_stemmer: bool):
    """A `RougeScorer` of these kinds ("rouge1", "rougeL") with `UnicodeTokenizer`."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(kinds), tokenizer=UnicodeTokenizer(use_stemmer))
