"""Turn documents into examples and batches, and train a small tokenizer on given texts."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import PreTrainedTokenizerFast

from moe_unlearn.data import chats, seams
from moe_unlearn.data.corpus import Document
from moe_unlearn.data.selection import DataReport
from moe_unlearn.data.special import added
from moe_unlearn.lazy import Lazy
from moe_unlearn.ops.token_loss import IGNORED

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


class DocumentError(ValueError):
    """Error for a document of which no example can be made; `reason` says why, without the place of the document."""

    def __init__(self, reason: str, where: str = ""):
        super().__init__(f"{where}: {reason}" if where else reason)
        self.reason = reason


@dataclass(frozen=True)
class Example:
    """One row of token ids with its labels (-100 carries no loss) and the length of its prefix.

    The prefix is the title or prompt together with the tokenizer's begin tokens, 0 tokens where there is neither
    title nor prompt; metrics may show it to the model. `asked` holds the prompt's tokens where a model is asked with
    others (seam="separate"). `straddled` is true if the first token of the answer begins in the prompt. `alternate`
    is the row with the alternate answer in the answer's place, where the document has one (its field `alternate`).
    `continues` is true for a later piece of the document whose row stands before it.
    """

    input_ids: list[int]
    labels: list[int]
    prefix: int
    asked: list[int] | None = None
    straddled: bool = False
    alternate: "Example | None" = None
    continues: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most `vocab_size` tokens; return a `PreTrainedTokenizerFast`.

    The vocabulary starts with <pad>, <s>, </s> and the 256 bytes, so any text can be encoded and decodes to
    itself. `tokenizer(text)` begins with <s> and ends with </s>. Training is deterministic. Raises ValueError if
    `vocab_size` is below 259 or there is no text.
    """
    from tokenizers import Tokenizer as Trained
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    smallest = 256 + len(SPECIAL)
    if vocab_size < smallest:
        raise ValueError(f"expected a vocab_size >= {smallest} (bytes, special tokens); got {vocab_size}")
    texts = list(texts)
    if not any(texts):
        raise ValueError("expected some text to train the tokenizer on; got none")
    tokenizer = Trained(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos, eos = SPECIAL["bos_token"], SPECIAL["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(token, tokenizer.token_to_id(token)) for token in (bos, eos)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL)


def encode(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    max_length: int,
    *,
    overflow: str = "split",
    chat: bool | chats.Chat = False,
    prompt_tokens: int = 0,
    seam: str = "joint",
    alternates: bool = False,
    report: DataReport | None = None,
) -> list[Example]:
    """Return all examples of `iter_examples` in a list."""
    return list(
        iter_examples(
            documents,
            tokenizer,
            max_length,
            overflow=overflow,
            chat=chat,
            prompt_tokens=prompt_tokens,
            seam=seam,
            alternates=alternates,
            report=report,
        )
    )


def iter_examples(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    max_length: int,
    *,
    overflow: str = "split",
    chat: bool | chats.Chat = False,
    prompt_tokens: int = 0,
    seam: str = "joint",
    alternates: bool = False,
    report: DataReport | None = None,
) -> Iterator[Example]:
    """Yield examples of at most `max_length` tokens: [begin] prompt or title, text, [end].

    Begin and end are the special tokens that `tokenizer(text)` puts around a text, none where it adds none. The
    answer to a prompt always ends with the end-of-sequence token (`special.Added`). The report names these tokens.

    A prompt is masked with -100, a title is not. Prompt and text are encoded as one text. A token on both sides of
    the seam belongs to the text, and the report counts it; with seam="separate", instead, as many tokens are masked
    as the prompt has alone (`seams`). With `overflow="split"`, text that does not fit goes to further examples,
    except that a document with a prompt is cut, since a later piece of its answer would lack the question.
    `overflow="truncate"` cuts every document. The later pieces of a split document have no prefix.

    With `chat`, true or a `Chat` with the template's options, the tokenizer's chat template asks the question (or
    prompt) as the user and gives the text as the assistant. The answer and its end token carry a loss; what the
    template writes before and behind them carries none (`chats`). Documents without a prompt remain plain texts.

    The answer to a prompt has an alternate where its record has a text `alternate` (AltPO). The alternate takes the
    answer's place in a row of its own, cut as the answer is. One that spells a special token of the template is left
    out or, with `alternates`, for objectives that need them, is treated as such an answer is.

    With `prompt_tokens`, the first that many tokens of each example without a prompt, begin and title included,
    become its prompt, so that objectives that answer prompts can use a book. A piece no longer than that is in no
    example.

    Raises DocumentError for a prompt that leaves no room for its text, with `chat` for a text that spells a special
    token of the template (with `alternates`, also for an alternate that does), and for a text no longer than
    `prompt_tokens`. With a `report` such a document is instead dropped and counted there, and documents that were cut
    are counted too. Raises ValueError also if `max_length` is below 2, `prompt_tokens` is not below it, `seam` or
    `overflow` is unknown, or there is no chat template.
    """
    if max_length < 2:
        raise ValueError(f"expected a max_length of at least 2; got {max_length}")
    if not 0 <= prompt_tokens < max_length:
        raise ValueError(f"expected prompt_tokens of at least 0 and below max_length {max_length}; got {prompt_tokens}")
    if overflow not in ("split", "truncate"):
        raise ValueError(f"expected overflow 'split' or 'truncate'; got {overflow!r}")
    seams.check(seam)
    if chat:
        turn_of = chats.turns(tokenizer, chats.Chat() if chat is True else chat, seam=seam)
    around = added(tokenizer)
    if report is not None:
        report.special_tokens = around.describe(tokenizer)

    def tokens_of(document: Document) -> _Tokens:
        if chat and document.prompt:
            turn = turn_of(document)
            return _Tokens(turn.prompt, [], turn.answer + turn.rest, len(turn.rest), turn.asked, turn.straddled)
        parts = [document.prompt, f"{document.title}\n" if document.title else "", document.text]
        found = seams.split(tokenizer, parts, seam=seam)
        prompt, title, text = found.parts
        asked = None if found.asked is None or not document.prompt else around.begin + found.asked
        text = title + text + (around.answer_end if document.prompt else around.end)
        return _Tokens(around.begin + prompt, title, text, 0, asked, found.straddled)

    def alternate_of(other: Document | None) -> tuple[Example | None, bool]:
        """Return the row with the alternate answer, and whether it was cut."""
        if other is None:
            return None, False
        tokens = tokens_of(other)
        masked = len(tokens.prompt)
        piece = tokens.text[: max(max_length - masked, 0)]
        return tokens.example(piece, masked) if piece else None, len(piece) < len(tokens.text)

    for number, document in enumerate(documents):
        where = f"document {number}"
        if chat and document.prompt and (spelled := chats.special_token_in(document, tokenizer)):
            _refuse(report, "spells a special token", where, f"its text spells the special token {spelled!r}")
            continue
        other = _with_alternate(document)
        if chat and other is not None and (spelled := chats.special_token_in(other, tokenizer)):
            if alternates:
                message = f"its alternate spells the special token {spelled!r}"
                _refuse(report, "its alternate spells a special token", where, message)
                continue
            other = None
        tokens = tokens_of(document)
        prompt, title, text = tokens.prompt, tokens.title, tokens.text
        room = max_length - len(prompt)
        if room < 1:
            message = (
                f"its prompt takes {len(prompt)} tokens and leaves no room for text in max_length {max_length}; "
                f"prompt: {document.prompt[:60]!r}"
            )
            _refuse(report, "prompt leaves no room", where, message)
            continue
        masked = len(prompt) if document.prompt else prompt_tokens
        pieces = [text[i : i + room] for i in range(0, len(text), room)]
        whole = len(pieces)
        if overflow == "truncate" or document.prompt:
            pieces = pieces[:1]
        pieces = [piece for piece in pieces if len(prompt) + len(piece) > masked]
        if text and not pieces:
            message = f"it has {len(prompt) + len(text)} tokens, none behind the {masked} of its prompt"
            _refuse(report, "shorter than prompt_tokens", where, message)
            continue
        alternate, cut = alternate_of(other)
        if report is not None:
            report.truncated += cut or len(pieces) < whole
            report.straddled += tokens.straddled
        for i, piece in enumerate(pieces):
            titled = min(len(title), len(piece)) if i == 0 else 0
            prefix = len(prompt) + titled if titled or document.prompt else 0
            made = tokens.example(piece, masked)
            yield replace(made, prefix=max(prefix, masked), alternate=alternate, continues=i > 0)


@dataclass(frozen=True)
class _Tokens:
    """Token ids of a document: the given prompt, the title, and the text with the title in front and the end behind.

    The last `rest` tokens of the text are the template's; `asked` and `straddled` are as in `Example`.
    """

    prompt: list[int]
    title: list[int]
    text: list[int]
    rest: int
    asked: list[int] | None
    straddled: bool

    def example(self, piece: list[int], masked: int) -> Example:
        """Return the row of the prompt and a piece of the text; its first `masked` tokens carry no loss."""
        ids, end = self.prompt + piece, len(self.prompt) + len(self.text) - self.rest
        labels = ([IGNORED] * masked + ids[masked:end] + [IGNORED] * self.rest)[: len(ids)]
        return Example(ids, labels, masked, self.asked, self.straddled)


def _with_alternate(document: Document) -> Document | None:
    """Return the document with its alternate in the answer's place; None where it has no prompt or no alternate."""
    answer, said = document.text, document.fields.get("alternate")
    if not document.prompt or not isinstance(said, str) or not said.strip():
        return None
    return replace(document, text=answer[: len(answer) - len(answer.lstrip())] + said.strip())


def _refuse(report: DataReport | None, reason: str, where: str, message: str) -> None:
    if report is None:
        raise DocumentError(message, where)
    report.drop(reason, where)
    report.kept -= 1


def batches(
    examples: Sequence[Example],
    batch_size: int,
    *,
    pad_id: int = 0,
    seed: int | None = None,
    epoch: int = 0,
    packing: int | None = None,
) -> Sequence[dict[str, Tensor]]:
    """Return right-padded batches `input_ids`, `attention_mask`, `labels` [B, S] and `index` [B], all int64.

    `index` is the position in `examples`. With a `seed` the order is shuffled, differently in each `epoch`;
    without one it is kept. With `packing`, for a model that `check_packing` accepts, the rows of a batch may share rows
    of that many tokens in the model's calls (`model.packing`). Batches are in a list, or made when they are asked for
    if `examples` are `Lazy`. Raises ValueError if there are no examples or `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"expected a batch_size of at least 1; got {batch_size}")
    if not examples:
        raise ValueError("expected at least one example to make batches of; got none")
    order: Sequence[int] = range(len(examples))
    if seed is not None:
        order = torch.randperm(len(order), generator=generator(seed, epoch)).tolist()

    def batch(i: int) -> dict[str, Tensor]:
        rows = order[i * batch_size : (i + 1) * batch_size]
        return collate([examples[row] for row in rows], rows, pad_id=pad_id, packing=packing)

    made = Lazy(-(-len(order) // batch_size), batch)
    return made if isinstance(examples, Lazy) else [*made]


def collate(
    examples: Sequence[Example], index: Sequence[int], *, pad_id: int = 0, packing: int | None = None
) -> dict[str, Tensor]:
    """Return one batch of these examples, with `packing` [B] if it is given; see `batches`."""
    longest = max(map(len, examples))

    def padded(rows: Iterable[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows], dtype=torch.int64)

    batch = {
        "input_ids": padded((e.input_ids for e in examples), pad_id),
        "attention_mask": padded(([1] * len(e) for e in examples), 0),
        "labels": padded((e.labels for e in examples), IGNORED),
        "index": torch.tensor(index, dtype=torch.int64),
    }
    return batch if packing is None else batch | {"packing": torch.full((len(examples),), packing)}


def generator(seed: int, epoch: int) -> torch.Generator:
    """Return a random generator that is different for every (seed, epoch)."""
    # torch's CPU generator reads only 32 bits of its seed, so a hash of both numbers supplies these bits
    return torch.Generator().manual_seed(random.Random(f"{seed} {epoch}").getrandbits(32))


def pad_token_id(tokenizer: Tokenizer) -> int:
    """Return the tokenizer's padding id, else its end id, else 0; padding carries no loss and no attention."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((i for i in candidates if i is not None), 0)
