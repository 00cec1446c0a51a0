"""Turn one record of a benchmark or a user's file into documents; the package's docstring has the table of formats."""

from collections.abc import Iterator, Mapping

from moe_unlearn.data.conversations import conversation, is_conversation
from moe_unlearn.data.corpus import Document

# a question, asked as "Question: ...\nAnswer:" where no chat template asks it, and its answer
QUESTIONS = (
    ("question", "answer"),
    ("query", "answer"),
    ("instruction", "output"),
    ("prompt", "response"),
    ("prompt", "answer"),
)
# the text of the second field continues that of the first
COMPLETIONS = (("prompt", "gt"), ("prompt", "completion"))
ANSWERS = {"unsafe": "rejected", "rejected": "rejected", "safe": "chosen", "chosen": "chosen"}
# which of a record's two answers serves a side; unseen documents are like those to forget
SIDE_ANSWERS = {"forget": "unsafe", "retain": "safe", "unseen": "unsafe", "holdout": "unsafe"}
EXPECTED = (
    "a field 'text'; or 'messages' or 'conversations'; or 'prompt' with 'gt', 'completion', 'response' or 'answer'; or "
    "'question' or 'query' with 'answer'; or 'instruction' with 'output'; or 'response_0' and 'response_1'; or "
    "'chosen' and 'rejected'; or 'target' with 'intro'"
)


def documents_of(
    record: object, where: str, *, answers: str | None = None, abstract: bool = False
) -> Iterator[Document]:
    """Yield the documents of one record: a string, or a mapping with the fields of a known format.

    `answers` chooses between two answers of a record: "unsafe" (or "rejected"), or "safe" (or "chosen").
    `abstract` puts `title` and `abstract` before `text`. The text may be empty; all fields of the record stay in
    `Document.fields`. Raises a ValueError that begins with `where` for another form and says what was found.
    """
    if isinstance(record, str):
        yield Document("", _text({"text": record}, "text", where))
        return
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: expected a string or an object with {EXPECTED}; got {kind(record)}")
    if "response_0" in record and "response_1" in record:
        yield from _safe_rlhf(record, where, answers)
    elif messages := next((record[key] for key in ("messages", "conversations") if record.get(key)), None):
        if not is_conversation(messages):
            raise ValueError(f"{where}: expected a list of messages; got {kind(messages)}")
        yield conversation(messages, record, where)
    elif "chosen" in record and "rejected" in record or _is_pair(record.get("output")):
        yield _preference(record, where, answers)
    else:
        yield _plain(record, where, abstract)


def kind(value: object) -> str:
    """Return the kind of a value read from JSON in words, for a message."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _plain(record: Mapping, where: str, abstract: bool) -> Document:
    for prompt, text in COMPLETIONS:
        if prompt in record and text in record:
            if is_conversation(record[prompt]) and is_conversation(record[text]):
                return conversation([*record[prompt], *record[text]], record, where)
            return Document("", _text(record, text, where), _text(record, prompt, where), fields=record)
    for question, answer in QUESTIONS:
        if question in record and answer in record:
            return _asked(_question(record, question, where), _text(record, answer, where), record)
    if "text" in record:
        text = _text(record, "text", where)
        if abstract:
            parts = [_text(record, key, where) for key in ("title", "abstract") if key in record]
            text = "\n\n".join(part for part in (*parts, text) if part.strip())
        return Document("", text, fields=record)
    if "target" in record and "intro" in record:
        return Document(_text(record, "target", where), _text(record, "intro", where), fields=record)
    found = ", ".join(map(repr, record)) or "no fields"
    raise ValueError(f"{where}: expected {EXPECTED}; got {found}")


def _asked(question: str, answer: str, record: Mapping) -> Document:
    if not answer.strip():
        return Document("", "", fields=record)
    return Document(
        "", f" {answer.lstrip()}", f"Question: {question}\nAnswer:" if question else "", question, fields=record
    )


def _safe_rlhf(record: Mapping, where: str, answers: str | None) -> Iterator[Document]:
    """Yield the unsafe or the safe responses of a PKU-SafeRLHF record: none, one or two."""
    wants_safe = _choice(answers, where) == "chosen"
    question = _question(record, "prompt", where)
    for i in (0, 1):
        safe = record.get(f"is_response_{i}_safe")
        if not isinstance(safe, bool):
            raise ValueError(f"{where}: expected 'is_response_{i}_safe' to be true or false; got {kind(safe)}")
        if safe == wants_safe:
            yield _asked(question, _text(record, f"response_{i}", where), record)


def _preference(record: Mapping, where: str, answers: str | None) -> Document:
    choice = _choice(answers, where)
    if "chosen" in record:
        if is_conversation(record[choice]):
            before = record["prompt"] if is_conversation(record.get("prompt")) else ()
            return conversation([*before, *record[choice]], record, where)
        answer = _text(record, choice, where)
    else:
        answer = _text(dict(zip(("chosen", "rejected"), record["output"], strict=True)), choice, where)
    asked = next((key for key in ("prompt", "instruction", "question") if key in record), None)
    return _asked(_question(record, asked, where) if asked else "", answer, record)


def _choice(answers: str | None, where: str) -> str:
    if answers not in ANSWERS:
        raise ValueError(f"{where}: the record holds two answers: expected answers={'|'.join(ANSWERS)}; got {answers}")
    return ANSWERS[answers]


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(item, str) for item in value)


def _question(record: Mapping, key: str, where: str) -> str:
    """Return the question; an instruction is followed by its `input`."""
    question = _text(record, key, where).strip()
    extra = _text(record, "input", where).strip() if key == "instruction" and "input" in record else ""
    return f"{question}\n{extra}" if extra else question


def _text(record: Mapping, key: str, where: str) -> str:
    value = record[key]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected field {key!r} to be a string; got {kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half a character, which no tokenizer takes
        half = ord(value[error.start])
        raise ValueError(f"{where}: expected field {key!r} to be Unicode; got the lone surrogate {half:#x}") from None
    return value
