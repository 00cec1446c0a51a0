"""Find the special tokens that a tokenizer adds by itself, and those that are not text."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase as Tokenizer

_PROBE = "a"


@dataclass(frozen=True)
class Added:
    """Token ids that `tokenizer(text)` puts around a text, and those that follow the answer to a prompt.

    An answer always ends with a token: where the tokenizer adds nothing after a text, its end-of-sequence token
    follows the answer, as in chat templates.
    """

    begin: list[int]
    end: list[int]
    answer_end: list[int]

    def describe(self, tokenizer: Tokenizer) -> dict[str, list[str]]:
        """Return the tokens as they are spelled, for a report."""
        return {name: list(tokenizer.convert_ids_to_tokens(ids)) for name, ids in vars(self).items()}


def added(tokenizer: Tokenizer) -> Added:
    """Return what the tokenizer adds around a text, found by encoding one: a begin token it has may not be in use.

    Raises ValueError where a text does not have the same tokens with and without special tokens.
    """
    encode: Callable[..., Mapping[str, list[int]]] = tokenizer
    whole, bare = (encode(_PROBE, add_special_tokens=flag)["input_ids"] for flag in (True, False))
    starts = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
    if not bare or not starts:
        raise ValueError(
            f"expected a tokenizer that adds its special tokens around a text; {_PROBE!r} is {bare} without and "
            f"{whole} with them"
        )
    end = whole[starts[0] + len(bare) :]
    last = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return Added(whole[: starts[0]], end, end or last)


def special_ids(tokenizer: Tokenizer) -> set[int]:
    """Return the ids of all special tokens, without added tokens that are text (runs of spaces, `</think>`)."""
    return {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
