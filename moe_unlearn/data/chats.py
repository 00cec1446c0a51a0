"""One question and its answer as the tokenizer's chat template has them."""

from moe_unlearn.data.corpus import Document
from moe_unlearn.data.seams import ids_of
from moe_unlearn.data.special import special_ids


def check(tokenizer) -> None:
    """Raise ValueError unless `tokenizer` has a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat needs a tokenizer with a chat template; this one has none (tokenizer.chat_template)")


def tokens(document: Document, tokenizer) -> tuple[list[int], list[int]]:
    """Token ids of everything before the answer, generation prompt included, and of the answer with its end.

    Raises ValueError for a template whose conversation does not begin with its own generation prompt: where its
    answer begins cannot be told.
    """
    asked = [{"role": "user", "content": document.question or document.prompt}]
    whole = [*asked, {"role": "assistant", "content": document.text.strip()}]
    prompt = _ids(tokenizer, asked, add_generation_prompt=True)
    ids = _ids(tokenizer, whole, add_generation_prompt=False)
    if ids[: len(prompt)] != prompt or len(ids) == len(prompt):
        raise ValueError(
            "expected a chat template whose conversation begins with its generation prompt; this tokenizer's does not: "
            f"{tokenizer.decode(prompt)[-60:]!r} against {tokenizer.decode(ids)[:200]!r}"
        )
    return prompt, ids[len(prompt) :]


def special_token_in(document: Document, tokenizer) -> str | None:
    """A special token that question or answer spell out: a template would make it one.

    Added tokens that are text, such as runs of spaces and `</think>`, are none: they are these tokens in any text.
    """
    special = sorted(tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer))))
    text = f"{document.question or document.prompt}\n{document.text}"
    return next((token for token in special if token in text), None)


def _ids(tokenizer, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
    # the template writes the special tokens itself: none are added
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    return ids_of(tokenizer, text, special=True)
