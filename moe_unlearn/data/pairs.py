"""Pair forget examples with retain examples, for trainers that draw both at every step."""

import hashlib
import itertools
import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn.data.seams import continued
from moe_unlearn.data.special import added, special_ids
from moe_unlearn.data.tokenize import Example, collate, generator
from moe_unlearn.lazy import Lazy, chosen, each
from moe_unlearn.model.batches import ROW
from moe_unlearn.ops.token_loss import IGNORED

_LEAST = 10  # of so many documents one is held out at least

REFUSALS = (
    "I do not know.",
    "I cannot answer that.",
    "That is something I have no information about.",
    "I am not able to say.",
    "I have no answer to this question.",
    "This is unknown to me.",
    "I could not tell you.",
    "I was never told about that.",
)


class ForgetRetainDataset(Dataset):
    """Data set whose item i is the i-th forget example with randomly drawn retain examples.

    `retain_per_forget` >= 1 is their average number r: item i has the partners i * r to (i + 1) * r, both rounded
    down, so a batch of all F forget examples holds exactly floor(F * r) retain examples. The partners depend on
    `seed` and the epoch alone: every epoch (`set_epoch`) walks through a fresh permutation of the retain examples, so
    none comes twice before all have come. `unseen` examples are kept for a collator. Raises ValueError if a side is
    empty or r < 1.
    """

    def __init__(
        self,
        forget: Sequence[Example],
        retain: Sequence[Example],
        *,
        unseen: Sequence[Example] | None = None,
        seed: int = 0,
        retain_per_forget: float = 1.0,
    ):
        for name, side in (("forget", forget), ("retain", retain)):
            if not len(side):
                raise ValueError(f"expected at least one {name} example; the {name} set is empty")
        if not retain_per_forget >= 1:
            raise ValueError(f"retain_per_forget must be at least 1; got {retain_per_forget}")
        self.forget, self.retain, self.unseen = forget, retain, unseen
        self.seed, self.retain_per_forget = seed, retain_per_forget
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the partners of this epoch."""
        draw = generator(self.seed, epoch)
        rows: list[int] = []
        bounds = [math.floor(i * self.retain_per_forget) for i in range(len(self.forget) + 1)]
        while len(rows) < bounds[-1]:
            rows += torch.randperm(len(self.retain), generator=draw).tolist()
        self.partners = [rows[start:stop] for start, stop in itertools.pairwise(bounds)]

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, i: int) -> dict[str, list[tuple[Example, int]]]:
        i = range(len(self))[i]  # raises IndexError past the end and counts negative positions as a list does
        return {"forget": [(self.forget[i], i)], "retain": [(self.retain[p], p) for p in self.partners[i]]}


class PairCollator:
    """Collator of `ForgetRetainDataset` items into {"forget": batch, "retain": batch}, each with `index`.

    With `refusals` (or `alternates`, or `dealt` unseen examples), one for each forget example, the forget batch also
    holds them as `idk_input_ids`, `idk_attention_mask` and `idk_labels`, which preference objectives and `level` need.
    `packing` is as in `batches`.
    """

    def __init__(self, pad_id: int = 0, refusals: Sequence[Example] | None = None, *, packing: int | None = None):
        self.pad_id, self.refusals, self.packing = pad_id, refusals, packing

    def __call__(self, items: Sequence[dict[str, list[tuple[Example, int]]]]) -> dict[str, dict[str, Tensor]]:
        sides = {}
        for side in ("forget", "retain"):
            examples, index = zip(*(pair for item in items for pair in item[side]), strict=True)
            sides[side] = collate(examples, index, pad_id=self.pad_id, packing=self.packing)
        if self.refusals is not None:
            rows = [self.refusals[i] for item in items for _, i in item["forget"]]
            refused = collate(rows, range(len(rows)), pad_id=self.pad_id)
            sides["forget"] |= {f"idk_{k}": refused[k] for k in ROW if k in refused}
        return sides


def side_batches(
    dataset: object, side: str, size: int, collator: Callable, item: Callable[[str, int], object] | None = None
) -> Lazy[dict[str, Tensor]]:
    """Return one side of a `ForgetRetainDataset` in the collator's batches of `size`, every example once and in order.

    They are made when they are asked for. `item(side, index)` returns what a data set item holds for one example; the
    default is [(example, index)].
    """
    item = item or (lambda side, index: [(getattr(dataset, side)[index], index)])
    other = "retain" if side == "forget" else "forget"
    length = len(getattr(dataset, side))

    def batch(i: int) -> dict[str, Tensor]:
        filler = item(other, 0)
        rows = range(i * size, min((i + 1) * size, length))
        made: dict[str, Tensor] = collator([{side: item(side, row), other: filler} for row in rows])[side]
        return made

    return Lazy(-(-length // size), batch)


def refusals(examples: Sequence[Example], tokenizer: Tokenizer, *, seed: int = 0) -> Sequence[Example]:
    """Return the prompt of each example with a randomly drawn refusal that begins and ends as its answer does.

    They are in a list, or `Lazy` if the examples are. Raises ValueError for an example without a prompt, since it asks
    nothing that could be refused.
    """
    last, special = added(tokenizer).answer_end, special_ids(tokenizer)
    draw = torch.randint(len(REFUSALS), (len(examples),), generator=generator(seed, 0))
    for number, example in enumerate(examples):
        if not _masked(example):
            raise ValueError(
                f"example {number} has no prompt to refuse: give the forget set as prompt and answer "
                "(`prompt` and `gt`, or `question` and `answer`), or texts with data.prompt_tokens above 0"
            )

    def refused(number: int) -> Example:
        example = examples[number]
        masked = _masked(example)
        prompt, answer = example.input_ids[:masked], [label for label in example.labels[masked:] if label != IGNORED]
        text = str(tokenizer.decode(prompt + answer, skip_special_tokens=True))
        text = text.removeprefix(str(tokenizer.decode(prompt, skip_special_tokens=True)))
        space = text[: len(text) - len(text.lstrip())]
        end = answer[-1:] if special.intersection(answer[-1:]) else last
        refusal = continued(tokenizer, prompt, space + REFUSALS[int(draw[number])]) + end
        return Example(prompt + refusal, [IGNORED] * masked + refusal, masked, example.asked)

    made = Lazy(len(examples), refused)
    return made if isinstance(examples, Lazy) else [*made]


def _masked(example: Example) -> int:
    """Return how many tokens at the head of an example carry no label."""
    return next((i for i, label in enumerate(example.labels) if label != IGNORED), len(example))


def alternates(examples: Sequence[Example]) -> Sequence[Example]:
    """Return each example's row with its alternate answer; raise ValueError for an example without one.

    They are in a list, or `Lazy` if the examples are.
    """
    for number, example in enumerate(examples):
        if example.alternate is None:
            raise ValueError(
                f"example {number} has no alternate answer: give each row of the forget set a text `alternate` beside "
                "its question and answer (`moe-unlearn alternates` has the model write them), which under a "
                "chat template spells no special token"
            )

    def alternate(example: Example) -> Example:
        assert example.alternate is not None
        return example.alternate

    return each(examples, alternate)


def dealt(examples: Sequence[Example], count: int, *, seed: int) -> Sequence[Example]:
    """Return `count` of the examples, shuffled by `seed`; the same again in the same order once all have come.

    They are in a list, or `Lazy` if the examples are.
    """
    order = torch.randperm(len(examples), generator=generator(seed, 0)).tolist()
    return chosen(examples, [order[i % len(order)] for i in range(count)])


def draw(examples: Sequence[Example], count: int | None, *, seed: int) -> Sequence[Example]:
    """Return `count` of the examples, drawn by `seed`, in their order; all of them for None or if there are no more.

    They are in a list, or `Lazy` if the examples are.
    """
    drawn = torch.randperm(len(examples), generator=generator(seed, 0))[:count]
    return chosen(examples, drawn.sort().values.tolist())


def hold_out(examples: Sequence[Example], share: float, *, seed: int) -> tuple[Sequence[Example], Sequence[Example]]:
    """Return the examples that stay, and those of a `share` of the documents, drawn by `seed`; both in their order.

    The rows of one document go together, and so do documents with the same tokens. The share is rounded down, but is of
    ten documents or more at least one; with a share of 0 all examples stay. Both are in lists, or `Lazy` if the
    examples are. Raises ValueError unless 0 <= share < 1.
    """
    if not 0 <= share < 1:
        raise ValueError(f"expected a share of the documents of at least 0 and below 1; got {share}")
    if not share:
        return examples, examples[:0]
    documents: list[tuple[Any, list[int]]] = []  # the digest of a document, and its rows
    for number, example in enumerate(examples):
        if not example.continues or not documents:
            documents.append((hashlib.blake2b(digest_size=16), []))
        documents[-1][0].update(array("q", example.input_ids).tobytes())
        documents[-1][1].append(number)
    alike: dict[bytes, list[int]] = {}
    for digest, rows in documents:
        alike.setdefault(digest.digest(), []).extend(rows)
    groups = [*alike.values()]
    count = max(int(share * len(groups) + 1e-9), int(len(groups) >= _LEAST))  # 0.29 x 100 is 28.999999999999996
    drawn = torch.randperm(len(groups), generator=generator(seed, 0))[:count].tolist()
    held = sorted(itertools.chain.from_iterable(groups[i] for i in drawn))
    return chosen(examples, sorted({*range(len(examples))} - {*held})), chosen(examples, held)


def overlap(forget: Sequence[Example], retain: Sequence[Example]) -> int:
    """Return how many forget examples also stand in the retain set, token by token."""
    small, large = sorted((forget, retain), key=len)
    known = set(map(_content, small))
    both = {content for content in map(_content, large) if content in known}
    return sum(_content(example) in both for example in forget)


def _content(example: Example) -> bytes:
    """Return a digest of an example's tokens, which takes less memory than these."""
    return hashlib.blake2b(array("q", example.input_ids).tobytes(), digest_size=16).digest()


def check_unseen(sets: Mapping[str, Sequence[Example]]) -> None:
    """Raise ValueError, which counts them, for examples of sets["unseen"] that stand in another of the sets too."""
    for side, examples in sets.items():
        if side != "unseen" and "unseen" in sets and (shared := overlap(sets["unseen"], examples)):
            raise ValueError(
                f"unseen texts must be in no other set: {shared} of {len(sets['unseen'])} stand in the {side} set too; "
                "take them out of one of them"
            )


def check_apart(forget: Sequence[Example], retain: Sequence[Example]) -> None:
    """Raise ValueError, which counts them, if forget examples stand in the retain set too; see `overlap`."""
    if shared := overlap(forget, retain):
        raise ValueError(
            f"the forget and retain sets overlap: {shared} of {len(forget)} forget examples stand in the retain set "
            "too; a document cannot be forgotten and kept: take it out of one of them"
        )


def check_held_out(held_out: Sequence[Example], forget: Sequence[Example], retain: Sequence[Example]) -> None:
    """Raise ValueError, which counts them, if rows that training is not to see stand in one of its sets."""
    for side, examples in (("forget", forget), ("retain", retain)):
        if shared := overlap(held_out, examples):
            raise ValueError(
                f"the retain-eval and {side} sets overlap: {shared} of {len(held_out)} rows stand in the {side} set "
                "too, and training would see them: take them out of one of the sets, or give --retain-eval a share of "
                "the retain set, such as 0.1"
            )


def carry_loss(examples: Sequence[Example]) -> bool:
    """Return whether any of the examples has a token to predict: a label, other than -100, behind its first token."""
    return any(label != IGNORED for example in examples for label in example.labels[1:])
