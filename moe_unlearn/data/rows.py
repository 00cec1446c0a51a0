"""Make examples of rows in memory: texts, records, documents, a `datasets.Dataset` or tokens."""

from collections.abc import Iterable, Mapping, Sized
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn.config import Data
from moe_unlearn.data.chats import Chat
from moe_unlearn.data.corpus import Document
from moe_unlearn.data.records import SIDE_ANSWERS, documents_of
from moe_unlearn.data.tokenize import DocumentError, Example, encode
from moe_unlearn.ops.token_loss import IGNORED


def check_rows(side: str, rows: object) -> None:
    """Raise TypeError unless `rows` can be counted and iterated, and ValueError if there are none."""
    if isinstance(rows, str | Mapping) or not isinstance(rows, Iterable) or not isinstance(rows, Sized):
        raise TypeError(
            f"{side}: expected a list of texts, records, Documents or Examples, or a datasets.Dataset; got "
            f"{type(rows).__name__}"
        )
    if not len(rows):
        raise ValueError(f"{side}: expected at least one document or example; the set is empty")


def encode_rows(rows: Iterable, tokenizer: Tokenizer, max_length: int, *, side: str, **encoding: Any) -> list[Example]:
    """Return the examples of all rows, in their order; `encoding` holds further keywords of `encode`.

    A row is an `Example`, a `Document`, a text, a record as `load` knows them (of two answers, the side's is taken),
    or tokens: `input_ids`, and `labels` where these differ. Tokens at the ends that the `attention_mask` leaves out
    are padding. Empty texts are left out. Raises TypeError for another kind, and ValueError for records of another
    form and for `position_ids` that do not count the tokens (a packed row), naming side and row.
    """
    made: list[Example] = []
    for number, row in enumerate(rows):
        where = f"{side}, row {number}"
        if isinstance(row, Example):
            made.append(row)
        elif isinstance(row, Mapping) and "input_ids" in row:
            made.append(_tokens(row, where))
        elif isinstance(row, Document | str | Mapping):
            answers = SIDE_ANSWERS.get(side)
            documents = [row] if isinstance(row, Document) else documents_of(row, where, answers=answers)
            for document in documents:
                if document.text.strip():
                    made += _encoded(document, where, tokenizer, max_length, encoding)
        else:
            raise TypeError(f"{where}: expected a text, a record, a Document or an Example; got {type(row).__name__}")
    return made


def encode_side(rows: Iterable, tokenizer: Tokenizer, settings: Data, *, side: str, alternates: bool) -> list[Example]:
    """Return the examples of one side's rows, encoded as a recipe's data section says; errors as of `encode_rows`.

    `alternates` says that the forget rows are needed with their alternate answers. Rows that are examples or tokens
    stay as they are.
    """
    return encode_rows(rows, tokenizer, side=side, **side_encoding(settings, side, alternates=alternates))


def side_encoding(settings: Any, side: str, *, alternates: bool) -> dict[str, Any]:
    """Return how the rows of one side are encoded, as keywords of `encode`.

    `settings` are the data section of a recipe, or the options of a verb of the same names. Only the forget side has
    alternates, and the retain side no prompt tokens, since its texts are learned whole.
    """
    return {
        "max_length": settings.max_length or Data.max_length,
        "chat": Chat.chosen(settings),
        "seam": settings.seam,
        "prompt_tokens": 0 if side == "retain" else settings.prompt_tokens,
        "alternates": alternates and side == "forget",
    }


def _encoded(document: Document, where: str, tokenizer: Tokenizer, max_length: int, encoding: dict) -> list[Example]:
    try:
        return encode([document], tokenizer, max_length, **encoding)
    except ValueError as error:
        raise ValueError(f"{where}: {error.reason if isinstance(error, DocumentError) else error}") from None


def _tokens(row: Mapping, where: str) -> Example:
    ids = [int(token) for token in row["input_ids"]]
    labels = [int(label) for label in (ids if row.get("labels") is None else row["labels"])]
    if len(labels) != len(ids) or not ids:
        raise ValueError(f"{where}: expected as many labels as input_ids, not none; got {len(labels)} and {len(ids)}")
    kept = _attended(row, len(ids), where)
    ids, labels = ids[kept.start : kept.stop], labels[kept.start : kept.stop]
    masked = next((i for i, label in enumerate(labels) if label != IGNORED), len(ids))
    return Example(ids, labels, masked)


def _attended(row: Mapping, count: int, where: str) -> range:
    """Return the range of a row's tokens that are not padding."""
    mask: Any = row.get("attention_mask")
    positions = row.get("position_ids")
    attended = list(range(count)) if mask is None else [i for i, one in enumerate(mask) if one]
    kept = range(attended[0], attended[-1] + 1) if attended else range(0)
    if not attended or len(attended) != len(kept) or (mask is not None and len(mask) != count):
        raise ValueError(f"{where}: expected an attention_mask of {count} tokens, ones in one piece; got {list(mask)}")
    own = None if positions is None else [int(i) for i in positions[kept.start : kept.stop]]
    if own not in (None, list(kept), list(range(len(kept)))):
        raise ValueError(f"{where}: expected position_ids that count the tokens; got {own}: give each example as a row")
    return kept
