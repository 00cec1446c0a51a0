"""List where projects compute one benchmark differently; `eval --like NAME` makes numbers comparable with theirs.

                    this package                            open-unlearning                  muse_bench
    seam            prompt and answer encoded as one; a     as many tokens of the whole are the prompt as it has alone;
                    token on both sides is the answer's     a model is asked with the prompt encoded alone
    insert_space    MUSE's continuation stands as it is     a space before it                as it is
    drop_last       min-k, extraction strength and exact    the last token never counts,     every token counts
                    memorisation of MUSE and TOFU leave     whether it is an end token
                    out an end token, min-k of TOFU not     or not
    stop_at_end     any special token ends an answer        the end-of-sequence token alone; other special tokens are
                                                            left out of the text
    truth           the answer as it stands; VerbMem's cut  decoded from its tokens,         decoded; VerbMem's encoded
                    at 128 tokens                           VerbMem's cut at 128             alone and cut at 128, its
                                                                                             begin token counted
    text_window     `max_length` counts the begin token     it does not                      nothing is cut, but here
                                                                                             at the model's context
    unseen_auc      no privleak and no rel_diff without     0.5 stands for the retrained     (needs the run)
                    a reference run                         model's AUC
    last_extracted  the extraction strength of a row with   its last token counts as         (has no such number)
                    a wrong last token is 0                 extracted: at least 1 / n

A row that cannot be measured is left out and reported, whosever ways are followed (`left_out`). open-unlearning does
not look for such rows: it encodes a special token that a text spells as that token; it cuts a question that fills its
window and labels the end token alone; a row without a label makes its mean NaN; and it generates beyond the model's
context. So a number of theirs that such rows are part of has no counterpart here.

This package's ways follow what a user's model is asked and what it answers: no token at the seam that training did
not have, no label on a prompt's token, and no label missing at the end of a text.

Sources: open-unlearning, src/data/utils.py and src/evals/metrics/utils.py (MIT); muse_bench, metrics/*.py. Two more
of open-unlearning's ways are not offered here: it cuts a question with its few-shot examples at 512 tokens, and with
a chat template it shows these as turns.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn.data import Example, added, special_ids
from moe_unlearn.ops.token_loss import IGNORED


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """The ways of one project (see the module docstring); the defaults are this package's."""

    name: str = "moe-unlearn"
    seam: str = "joint"
    insert_space: bool = False
    drop_last: bool = False
    stop_at_end: bool = False
    truth: str = "text"
    text_window: bool = False
    last_extracted: bool = False
    unseen_auc: float | None = None


OURS = Conventions()
LIKE = {
    "open-unlearning": Conventions(
        name="open-unlearning",
        seam="separate",
        insert_space=True,
        drop_last=True,
        stop_at_end=True,
        truth="decoded",
        text_window=True,
        last_extracted=True,
        unseen_auc=0.5,
    ),
    "muse_bench": Conventions(name="muse_bench", seam="separate", stop_at_end=True, truth="alone", text_window=True),
}
# settings of a benchmark that belong to a project's ways
_SETTINGS: dict[str, dict[str, Any]] = {
    "open-unlearning": {"use_stemmer": True},
    "muse_bench": {"use_stemmer": False, "max_length": 2**31},
}

_Settings = TypeVar("_Settings")


def like(name: str, settings: Callable[..., _Settings], **changes: Any) -> _Settings:
    """Return the `settings` of a benchmark that make its numbers comparable with those of project `name`.

    Raises ValueError for another name.
    """
    if name not in LIKE:
        raise ValueError(f"expected like to be one of {', '.join(LIKE)}; got {name!r}")
    return settings(like=LIKE[name], **(_SETTINGS[name] | changes))


def stops(tokenizer: Tokenizer, ways: Conventions) -> set[int]:
    """Return the tokens that end an answer."""
    return set(added(tokenizer).answer_end) if ways.stop_at_end else special_ids(tokenizer)


def decode(tokenizer: Tokenizer, ids: list[int], ways: Conventions) -> str:
    """Return the text of tokens."""
    if not ways.stop_at_end:
        return str(tokenizer.decode(ids))
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True))


def truth(tokenizer: Tokenizer, example: Example, answer: str, ways: Conventions, *, tokens: int | None = None) -> str:
    """Return the text with which an answer to the prompt of `example` is compared.

    `answer` is the answer in the data, and `tokens` is how many of its tokens count (for VerbMem).
    """
    if ways.truth == "text" and tokens is None:
        return answer
    if ways.truth == "alone" and tokens is not None:
        return decode(tokenizer, tokenizer(answer)["input_ids"][:tokens], ways)
    if ways.truth == "alone":
        return answer
    if tokens is None:
        asked = decode(tokenizer, prompt_of(example), ways)
        return decode(tokenizer, example.input_ids, ways).replace(asked, "").strip()
    return decode(tokenizer, example.input_ids[example.prefix : example.prefix + tokens], ways).strip()


def prompt_of(example: Example) -> list[int]:
    """Return the tokens that a model is asked with: `asked` if the seam gives it, else those before the first label."""
    if example.asked is not None:
        return example.asked
    start = next((i for i, label in enumerate(example.labels) if label != IGNORED), len(example))
    return example.input_ids[:start]


def without_end(example: Example, tokenizer: Tokenizer, ways: Conventions = OURS) -> Example:
    """Return the example without its end token, which metrics about the text itself do not count.

    With `drop_last` it loses its last token, whatever that is.
    """
    length = max((i for i, label in enumerate(example.labels) if label != IGNORED), default=-1) + 1
    if ways.drop_last:
        length -= 1
    else:
        special, begin = special_ids(tokenizer), len(added(tokenizer).begin)
        while length > begin and example.labels[length - 1] in special:
            length -= 1
    if length <= 0:
        return example
    kept: dict[str, Any] = {"input_ids": example.input_ids[:length], "labels": example.labels[:length]}
    return replace(example, prefix=min(example.prefix, length), **kept)
