"""Render a question or a conversation, and its answer, through the tokenizer's chat template.

A template writes fixed text of its own before an answer (Qwen3's empty `<think>` block, gpt-oss's
`<|channel|>final<|message|>`) and after it. Rendering two different answers to one question shows which text this is:
the beginning that both renderings share belongs to what the model is asked, and the end that both share follows the
answer.
"""

import datetime
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn.config import Data
from moe_unlearn.data.corpus import Document
from moe_unlearn.data.seams import ids_of, split
from moe_unlearn.data.special import special_ids
from moe_unlearn.errors import reason_of

DATE = datetime.date(2024, 7, 26)  # a template's date of today, unless one is given; Llama 3 falls back on it too
_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_ANSWERS = ("one", "two")  # alike neither at their beginning nor at their end


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Options for rendering a chat template.

    `enable_thinking` is passed on if it is not None. `system` is the system message; an empty one is left out.
    `date`, in the form 2026-11-29, is what the template takes for today and receives as `date_string`. Without it the
    template takes `DATE`, because tokens that change daily would match no stored reference. Raises ValueError for
    another form of date.
    """

    enable_thinking: bool | None = None
    system: str = ""
    date: str | None = None

    def __post_init__(self) -> None:
        if self.date is not None:
            try:
                datetime.date.fromisoformat(self.date)
            except ValueError:
                raise ValueError(f"expected a date as 2026-11-29; got {self.date!r}") from None

    @classmethod
    def chosen(cls, settings: Data) -> "bool | Chat":
        """Return how a recipe's data section asks questions: a `Chat` for the chat template, or False without one."""
        names = ("enable_thinking", "system", "date")
        return settings.chat_template and cls(**{name: getattr(settings, name) for name in names})

    def keywords(self, template: str) -> dict:
        """Return the keywords of the rendering: the template with its date filled in, and the options that are set.

        Raises ValueError for a template that does not spell out the form of its date.
        """
        day = DATE if self.date is None else datetime.date.fromisoformat(self.date)
        # transformers passes no function on to the template, so the template's own clock cannot be set
        given: dict = {"chat_template": _CLOCK.sub(lambda call: repr(day.strftime(call[2])), template)}
        if "strftime_now(" in given["chat_template"]:
            raise ValueError("expected a chat template that writes the form of its date: strftime_now('%d %b %Y')")
        if self.date is not None:
            given["date_string"] = day.strftime("%d %b %Y")
        if self.enable_thinking is not None:
            given["enable_thinking"] = self.enable_thinking
        return given


@dataclass(frozen=True)
class Turn:
    """Token ids of one rendered turn.

    `prompt` holds everything before the answer, `answer` the answer with its end token, and `rest` what follows it.
    `asked` and `straddled` are as in `seams.Split`.
    """

    prompt: list[int]
    answer: list[int]
    rest: list[int]
    asked: list[int] | None
    straddled: bool


def turns(tokenizer: Tokenizer, chat: Chat, *, seam: str = "joint") -> Callable[[Document], Turn]:
    """Return a function that gives the `Turn` of a document.

    With seam="separate", as in open-unlearning, everything after the generation prompt is the answer, and the
    end-of-sequence token ends it where the template does not.

    Raises ValueError for a tokenizer without a chat template, for a template that cannot be dated, and for one whose
    conversation does not begin with its own generation prompt, since then the start of the answer is unknown.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat needs a tokenizer with a chat template; this one has none: leave chat_template out")
    keywords = chat.keywords(tokenizer.get_chat_template())

    def render(before: Sequence[Mapping], answer: str | None) -> str:
        messages = [dict(message) for message in before]
        if chat.system and before[0]["role"] not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": chat.system})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        asking = answer is None
        try:
            made = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asking, **keywords)
        except Exception as error:  # a template is a program, which fails in any way
            raise ValueError(
                f"expected a chat template that renders a {' and a '.join(m['role'] for m in messages)} turn; this "
                f"tokenizer's fails: {type(error).__name__}: {reason_of(error)}"
            ) from error
        return str(made)

    def rendered(before: Sequence[Mapping], answer: str) -> tuple[str, str]:
        """Return the generation prompt and the rest of the conversation behind it."""
        asked, whole = render(before, None), render(before, answer)
        if not whole.startswith(asked) or len(whole) == len(asked):
            raise ValueError(
                "expected a chat template whose conversation begins with its generation prompt; this tokenizer's does "
                f"not: {asked[-60:]!r} against {whole[:200]!r}"
            )
        return asked, whole[len(asked) :]

    probes = [rendered([{"role": "user", "content": "?"}], answer)[1] for answer in _ANSWERS]
    fixed = os.path.commonprefix(probes)
    after = os.path.commonprefix([probe[::-1] for probe in probes])[::-1]
    end = _first_added(after, tokenizer)

    def turn(document: Document) -> Turn:
        asked, said = rendered(_messages(document), document.text.strip())
        if seam == "separate":
            prompt, ids = ids_of(tokenizer, asked, special=True), ids_of(tokenizer, asked + said, special=True)
            if ids[-1] != tokenizer.eos_token_id and tokenizer.eos_token_id is not None:
                ids.append(tokenizer.eos_token_id)
            return Turn(ids[: len(prompt)], ids[len(prompt) :], [], prompt, False)
        if said.startswith(fixed):  # not so where the template reads the answer, as Qwen3's does for `</think>`
            asked, said = asked + fixed, said[len(fixed) :]
        found = split(tokenizer, [asked, said], special=True)
        prompt, ids = found.parts
        if end is None:
            length = len(ids) - len(ids_of(tokenizer, after, special=True))
        else:
            places = [i for i, token in enumerate(ids) if token == end]
            length = next(iter(places[-after.count(str(tokenizer.convert_ids_to_tokens(end))) :]), len(ids) - 1) + 1
        return Turn(prompt, ids[:length], ids[length:], None, found.straddled)

    return turn


def special_token_in(document: Document, tokenizer: Tokenizer) -> str | None:
    """Return a special token that the question or the answer spells out, or None; a template would encode it as one.

    Added tokens that are ordinary text, such as runs of spaces and `</think>`, do not count: any text is encoded
    with them.
    """
    special = sorted(_spelled(tokenizer, special_ids(tokenizer)))
    text = "\n".join([*(message["content"] for message in _messages(document)), document.text])
    return next((token for token in special if token in text), None)


def _messages(document: Document) -> Sequence[Mapping]:
    """Return the turns before the answer."""
    return document.messages or [{"role": "user", "content": document.question or document.prompt}]


def _first_added(text: str, tokenizer: Tokenizer) -> int | None:
    """Return the token that ends an answer: the first special token in the text behind it, else the first added one."""
    for ids in (special_ids(tokenizer), tokenizer.added_tokens_decoder):
        spelled = _spelled(tokenizer, ids)
        found = [(text.index(token), -len(token), i) for token, i in spelled.items() if token.strip() and token in text]
        if found:
            return min(found)[2]
    return None


def _spelled(tokenizer: Tokenizer, ids: Iterable[int]) -> dict[str, int]:
    """Return the ids by the tokens as they are spelled, in the order of the ids."""
    return {str(tokenizer.convert_ids_to_tokens(i)): i for i in sorted(ids)}
