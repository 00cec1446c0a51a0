"""`moe-unlearn alternates`, by which a model writes other answers to the questions that it is to forget, for AltPO.

AltPO (arXiv 2409.13474) prefers an alternate answer, as plausible as the original one but with other facts, to the
original. The model that will unlearn writes the alternates itself, several for each question, at temperature 1 (the
paper has 5 for each, of at most 200 tokens). Each alternate is a row of its own, so that a question with five of them
becomes five forget rows. The instruction to the model is ours; another one may be given.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn import data
from moe_unlearn.cli.arguments import chat_of, loading_of, writable
from moe_unlearn.cli.options import INSTRUCTION
from moe_unlearn.data import Chat, Document
from moe_unlearn.files import write_text
from moe_unlearn.metrics import context_length, sampled
from moe_unlearn.metrics.conventions import prompt_of
from moe_unlearn.model import loading
from moe_unlearn.ranks import on_first

CUE = "Another answer:"
ATTEMPTS = 3  # how often an answer is sampled before an empty one or a copy of the original is left out
_QUESTION, _ANSWERS = "Question:", ("Answer:", CUE)  # a model that continues after its answer begins like this
_PLACES = 3  # the number of documents that a message names


def generate_alternates(
    model: nn.Module,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    *,
    count: int = 5,
    new_tokens: int = 200,
    temperature: float = 1.0,
    seed: int = 0,
    chat: bool | Chat = False,
    instruction: str = INSTRUCTION,
    batch_size: int = 8,
) -> list[dict]:
    """Make `count` records of each document, in order, each with an `alternate` answer that the model writes.

    A record, which `data.load` reads, also has the document's question and answer. The model is shown both and the
    instruction, with `chat` through the tokenizer's chat template. Its answer is sampled at `temperature` and ends at
    a special token, after `new_tokens` tokens or where another question begins. An answer that is empty, or equals the
    original one but for white space, is sampled anew, at most twice, and then left out, so that some documents may have
    fewer. Documents that cannot be asked are left out too: those without a prompt, with one too long for the model's
    context, or with one that spells a special token of the template. Stderr reports what was left out. Raises
    ValueError if nothing is left, for a `count`, `new_tokens` or `batch_size` below 1, for `new_tokens` that fill the
    model's context, and as `metrics.sampled`.
    """
    for name, value in (("count", count), ("new_tokens", new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"expected {name} of at least 1; got {value}")
    prompts, refused = {}, []
    context = context_length(model)
    room = 2**31 if context is None else context - new_tokens + 1
    if room < 2:
        raise ValueError(f"expected new_tokens to leave room for a prompt in the model's {context}; got {new_tokens}")
    for number, document in enumerate(documents):
        try:
            prompts[number] = _prompt(document, tokenizer, room, chat, instruction)
        except ValueError as error:
            refused.append(f"document {number}: {error.reason if isinstance(error, data.DocumentError) else error}")
    if not prompts:
        raise ValueError(f"expected at least one question with its answer; {refused[0] if refused else 'got none'}")
    found: dict[tuple[int, int], str] = {}
    wanted = [(number, i) for number in prompts for i in range(count)]
    for attempt in range(ATTEMPTS):
        missing = [place for place in wanted if place not in found]
        said = (
            sampled(
                model,
                [prompts[number] for number, _ in missing],
                new_tokens,
                temperature=temperature,
                seed=data.generator(seed, attempt).initial_seed(),
                batch_size=batch_size,
                pad_id=data.pad_token_id(tokenizer),
                stop=data.special_ids(tokenizer),
            )
            if missing
            else []
        )
        for place, tokens in zip(missing, said, strict=True):
            text = _answer(str(tokenizer.decode(tokens, skip_special_tokens=True)))
            if text and text.split() != documents[place[0]].text.split():
                found[place] = text
    refused += [
        f"document {number}: answer {i + 1} of {count} was empty or the original one {ATTEMPTS} times"
        for number, i in wanted
        if (number, i) not in found
    ]
    if not found:
        raise ValueError(f"the model wrote no alternate answer; {refused[0]}")
    if refused:
        more = "; ..." if len(refused) > _PLACES else ""
        print(f"left out: {len(refused)}: {'; '.join(refused[:_PLACES])}{more}", file=sys.stderr)
    return [_record(documents[place[0]]) | {"alternate": found[place]} for place in wanted if place in found]


def run(options: argparse.Namespace) -> None:
    """Have the model write alternate answers to the questions of a forget set, for the recipe altpo."""
    out = Path(options.out)
    if out.suffix != ".jsonl":
        raise ValueError(f"expected --out to be a .jsonl file, which `run --forget` reads; got {options.out!r}")
    how = loading_of(options)
    writable(out)
    model, tokenizer = loading.load_model(options.model, how)
    documents = [*data.load(options.forget, side="forget")]
    records = generate_alternates(
        model,
        tokenizer,
        documents,
        count=options.count,
        new_tokens=options.new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        chat=chat_of(options),
        instruction=options.instruction,
        batch_size=options.batch_size,
    )
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    on_first(partial(write_text, out, lines))
    print(f"{len(records)} alternate answers to {len(documents)} questions; saved to {out}")


def _prompt(document: Document, tokenizer: Tokenizer, room: int, chat: bool | Chat, instruction: str) -> list[int]:
    """Return the tokens of the model's prompt, fewer than `room`."""
    if not document.prompt:
        raise ValueError("expected a question and its answer; got a text without a prompt")
    asked = document.prompt if document.prompt.endswith("Answer:") else f"Question: {document.prompt.strip()}\nAnswer:"
    told = f"{asked} {document.text.strip()}\n\n{instruction}"
    # the document needs some text for its prompt to be encoded; the tokens of that text are not used
    [example] = data.encode([Document("", f" {CUE}", f"{told}\n{CUE}", told)], tokenizer, room, chat=chat)
    return prompt_of(example)


def _answer(text: str) -> str:
    """Return the text before the next question or answer, without a mark at the beginning of the answer itself."""
    text = text.partition(_QUESTION)[0]
    for mark in _ANSWERS:
        text = text.strip().removeprefix(mark).partition(mark)[0]
    return text.strip()


def _record(document: Document) -> dict:
    """Return the record that `data.load` reads as this document."""
    answer = document.text.strip()
    if document.messages:
        return {"messages": [*document.messages, {"role": "assistant", "content": answer}]}
    if document.prompt == f"Question: {document.question}\nAnswer:":
        return {"question": document.question, "answer": answer}
    return {"prompt": document.prompt, "gt": document.text}
