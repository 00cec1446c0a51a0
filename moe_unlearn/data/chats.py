"""A question, or a conversation, and its answer as the tokenizer's chat template has them.

A template writes text of its own before an answer, which depends on none (Qwen3's empty `<think>` block, gpt-oss's
`<|channel|>final<|message|>`), and after it. Two answers to one question tell which: what both renderings begin with
is asked of the model, what both end with follows the answer.
"""

import datetime
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moe_unlearn.data.corpus import Document
from moe_unlearn.data.seams import ids_of, split
from moe_unlearn.data.special import special_ids

DATE = datetime.date(2024, 7, 26)  # a template that asks for today's date gets this: Llama 3's own choice without one
_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_ANSWERS = ("one", "two")  # alike neither at their beginning nor at their end


@dataclass(frozen=True, kw_only=True)
class Chat:
    """How a chat template is rendered.

    `enable_thinking` is passed on if it is not None. `system` is the system message, none where it is empty. `date`,
    as 2026-11-29, is what the template takes for today and gets as `date_string`; without one it takes `DATE`, for
    tokens that change daily fit no reference that is kept. Raises ValueError for another form of date.
    """

    enable_thinking: bool | None = None
    system: str = ""
    date: str | None = None

    def __post_init__(self):
        if self.date is not None:
            try:
                datetime.date.fromisoformat(self.date)
            except ValueError:
                raise ValueError(f"expected a date as 2026-11-29; got {self.date!r}") from None

    @classmethod
    def chosen(cls, settings) -> "bool | Chat":
        """How questions are asked by settings as a recipe's data section: through the chat template, or not."""
        names = ("enable_thinking", "system", "date")
        return settings.chat_template and cls(**{name: getattr(settings, name) for name in names})

    def keywords(self, template: str) -> dict:
        """What is rendered beside the messages: the template with its date, and what it is told.

        Raises ValueError for a template whose form of date is not written in it.
        """
        day = DATE if self.date is None else datetime.date.fromisoformat(self.date)
        # transformers lets no function through to the template, so that its own clock cannot be set
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
    """Token ids: `prompt` is all before the answer, `answer` that with its end, `rest` what stands behind it.

    `asked` and `straddled` are as in `seams.Split`.
    """

    prompt: list[int]
    answer: list[int]
    rest: list[int]
    asked: list[int] | None
    straddled: bool


def turns(tokenizer, chat: Chat, *, seam: str = "joint") -> Callable[[Document], Turn]:
    """A function that gives a document's `Turn`.

    With seam="separate", open-unlearning's way, all that follows the generation prompt is the answer, and the
    end-of-sequence token ends it where the template does not.

    Raises ValueError for a tokenizer without a chat template or with one that cannot be dated, and for one whose
    conversation does not begin with its own generation prompt: where its answer begins cannot be told.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat needs a tokenizer with a chat template; this one has none (tokenizer.chat_template)")
    keywords = chat.keywords(tokenizer.get_chat_template())

    def render(before: Sequence[Mapping], answer: str | None) -> str:
        messages = [*before]
        if chat.system and before[0]["role"] not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": chat.system})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None, **keywords)

    def rendered(before: Sequence[Mapping], answer: str) -> tuple[str, str]:
        """The generation prompt, and what the conversation has behind it."""
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
        if said.startswith(fixed):  # else the template has read the answer, as Qwen3's reads `</think>`
            asked, said = asked + fixed, said[len(fixed) :]
        found = split(tokenizer, [asked, said], special=True)
        prompt, ids = found.parts
        if end is None:
            length = len(ids) - len(ids_of(tokenizer, after, special=True))
        else:
            places = [i for i, token in enumerate(ids) if token == end]
            length = next(iter(places[-after.count(tokenizer.convert_ids_to_tokens(end)) :]), len(ids) - 1) + 1
        return Turn(prompt, ids[:length], ids[length:], None, found.straddled)

    return turn


def special_token_in(document: Document, tokenizer) -> str | None:
    """A special token that question or answer spell out: a template would make it one.

    Added tokens that are text, such as runs of spaces and `</think>`, are none: they are these tokens in any text.
    """
    special = sorted(tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer))))
    text = "\n".join([*(message["content"] for message in _messages(document)), document.text])
    return next((token for token in special if token in text), None)


def _messages(document: Document) -> Sequence[Mapping]:
    """The turns before the answer."""
    return document.messages or [{"role": "user", "content": document.question or document.prompt}]


def _first_added(text: str, tokenizer) -> int | None:
    """The token that ends an answer: the first special one behind it, else the first added one."""
    for ids in (special_ids(tokenizer), tokenizer.added_tokens_decoder):
        spelled = {tokenizer.convert_ids_to_tokens(i): i for i in sorted(ids)}
        found = [(text.index(token), -len(token), i) for token, i in spelled.items() if token.strip() and token in text]
        if found:
            return min(found)[2]
    return None
