"""Turn conversations into documents: the last answer is learned or forgotten, the turns before it are its prompt."""

from collections.abc import Mapping, Sequence

from moe_unlearn.data.corpus import Document

# role names of transformers and of ShareGPT
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


def is_conversation(value: object) -> bool:
    """Return whether a value is a list of messages."""
    return isinstance(value, Sequence) and bool(value) and all(isinstance(item, Mapping) for item in value)


def conversation(messages: Sequence[Mapping], record: Mapping, where: str) -> Document:
    """Return the document of messages with `role` and `content`, or with ShareGPT's `from` and `value`.

    Its text is the last answer; messages after that are left out. The turns before it stay in `Document.messages`
    for a chat template; without a template the prompt reads "Question: ...\\nAnswer: ...", turn by turn. Raises a
    ValueError that begins with `where` for messages of another form, or without an answer.
    """
    turns = [_turn(message, f"{where}, message {number}") for number, message in enumerate(messages, 1)]
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    if last is None:
        raise ValueError(f"{where}: expected a message of the assistant; got {', '.join(t['role'] for t in turns)}")
    before, answer = turns[:last], turns[last]["content"]
    question = next((turn["content"].strip() for turn in reversed(before) if turn["role"] == "user"), "")
    text = f" {answer.lstrip()}" if before and answer.strip() else answer
    return Document("", text, _prompt(before), question, fields=record, messages=tuple(before))


def _turn(message: Mapping, where: str) -> dict[str, str]:
    role, content = (message.get(name, message.get(other)) for name, other in (("role", "from"), ("content", "value")))
    if role not in ROLES:
        raise ValueError(f"{where}: expected a role of {', '.join(ROLES)}; got {role!r}")
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{where}: expected its content to be text; got {type(content).__name__}")
    return {"role": ROLES[role], "content": content}


def _prompt(turns: Sequence[Mapping]) -> str:
    """Return the turns as text that ends where the answer begins."""
    made, asking = "", False
    for turn in turns:
        content = turn["content"].strip()
        if turn["role"] == "assistant":
            made, asking = f"{made} {content}\n\n", False
        elif turn["role"] == "user":
            made = made.removesuffix("Answer:") if asking else f"{made}Question: "
            made, asking = f"{made}{content}\nAnswer:", True
        else:
            made = f"{made}{content}\n\n"
    return made if asking else made.rstrip()
