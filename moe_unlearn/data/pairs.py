"""Pair forget examples with retain examples, for trainers that draw both at every step."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn.data.seams import continued
from moe_unlearn.data.special import added, special_ids
from moe_unlearn.data.tokenize import Example, collate, generator
from moe_unlearn.model.batches import ROW
from moe_unlearn.ops.token_loss import IGNORED

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
    none comes twice before all have come. Raises ValueError if a side is empty or r < 1.
    """

    def __init__(
        self, forget: Sequence[Example], retain: Sequence[Example], *, seed: int = 0, retain_per_forget: float = 1.0
    ):
        for name, side in (("forget", forget), ("retain", retain)):
            if not len(side):
                raise ValueError(f"expected at least one {name} example; the {name} set is empty")
        if not retain_per_forget >= 1:
            raise ValueError(f"retain_per_forget must be at least 1; got {retain_per_forget}")
        self.forget, self.retain, self.seed, self.retain_per_forget = forget, retain, seed, retain_per_forget
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

    With `refusals` (or `alternates`), one example for each forget example, the forget batch also holds them as
    `idk_input_ids`, `idk_attention_mask` and `idk_labels`, which preference objectives need.
    """

    def __init__(self, pad_id: int = 0, refusals: Sequence[Example] | None = None):
        self.pad_id, self.refusals = pad_id, refusals

    def __call__(self, items: Sequence[dict[str, list[tuple[Example, int]]]]) -> dict[str, dict[str, Tensor]]:
        sides = {}
        for side in ("forget", "retain"):
            examples, index = zip(*(pair for item in items for pair in item[side]), strict=True)
            sides[side] = collate(examples, index, pad_id=self.pad_id)
        if self.refusals is not None:
            rows = [self.refusals[i] for item in items for _, i in item["forget"]]
            refused = collate(rows, range(len(rows)), pad_id=self.pad_id)
            sides["forget"] |= {f"idk_{k}": refused[k] for k in ROW if k in refused}
        return sides


def side_batches(
    dataset: object, side: str, size: int, collator: Callable, item: Callable[[str, int], object] | None = None
) -> list[dict[str, Tensor]]:
    """Return one side of a `ForgetRetainDataset` in the collator's batches of `size`, every example once and in order.

    `item(side, index)` returns what a data set item holds for one example; the default is [(example, index)].
    """
    item = item or (lambda side, index: [(getattr(dataset, side)[index], index)])
    other = "retain" if side == "forget" else "forget"
    filler = item(other, 0)
    items = [{side: item(side, i), other: filler} for i in range(len(getattr(dataset, side)))]
    return [collator(items[i : i + size])[side] for i in range(0, len(items), size)]


def refusals(examples: Sequence[Example], tokenizer: Tokenizer, *, seed: int = 0) -> list[Example]:
    """Return the prompt of each example with a randomly drawn refusal that begins and ends as its answer does.

    Raises ValueError for an example without a prompt, since it asks nothing that could be refused.
    """
    last, special = added(tokenizer).answer_end, special_ids(tokenizer)
    draw = torch.randint(len(REFUSALS), (len(examples),), generator=generator(seed, 0)).tolist()
    made = []
    for number, (example, choice) in enumerate(zip(examples, draw, strict=True)):
        masked = next((i for i, label in enumerate(example.labels) if label != IGNORED), len(example))
        if not masked:
            raise ValueError(
                f"example {number} has no prompt to refuse: give the forget set as prompt and answer "
                "(`prompt` and `gt`, or `question` and `answer`), or texts with data.prompt_tokens above 0"
            )
        prompt, answer = example.input_ids[:masked], [label for label in example.labels[masked:] if label != IGNORED]
        text = str(tokenizer.decode(prompt + answer, skip_special_tokens=True))
        text = text.removeprefix(str(tokenizer.decode(prompt, skip_special_tokens=True)))
        space = text[: len(text) - len(text.lstrip())]
        end = answer[-1:] if special.intersection(answer[-1:]) else last
        refusal = continued(tokenizer, prompt, space + REFUSALS[choice]) + end
        made.append(Example(prompt + refusal, [IGNORED] * masked + refusal, masked, example.asked))
    return made


def alternates(examples: Sequence[Example]) -> list[Example]:
    """Return each example's row with its alternate answer; raise ValueError for an example without one."""
    found = [example.alternate for example in examples if example.alternate is not None]
    for number, example in enumerate(examples):
        if example.alternate is None:
            raise ValueError(
                f"example {number} has no alternate answer: give each row of the forget set a text `alternate` beside "
                "its question and answer (`moe-unlearn alternates` has the model write them), which under a "
                "chat template spells no special token"
            )
    return found


def draw(examples: Sequence[Example], count: int | None, *, seed: int) -> list[Example]:
    """Return `count` of the examples, drawn by `seed`, in their order; all of them for None or if there are no more."""
    if count is None:
        return list(examples)
    chosen = torch.randperm(len(examples), generator=generator(seed, 0))[:count]
    return [examples[i] for i in sorted(chosen.tolist())]


def overlap(forget: Sequence[Example], retain: Sequence[Example]) -> int:
    """Return how many forget examples also stand in the retain set, token by token."""
    kept = {tuple(e.input_ids) for e in retain}
    return sum(tuple(e.input_ids) in kept for e in forget)


def check_apart(forget: Sequence[Example], retain: Sequence[Example]) -> None:
    """Raise ValueError, which counts them, if forget examples stand in the retain set too; see `overlap`."""
    if shared := overlap(forget, retain):
        raise ValueError(
            f"the forget and retain sets overlap: {shared} of {len(forget)} forget examples stand in the retain set "
            "too; a document cannot be forgotten and kept: take it out of one of them"
        )


def carry_loss(examples: Sequence[Example]) -> bool:
    """Return whether any of the examples has a token to predict: a label, other than -100, behind its first token."""
    return any(label != IGNORED for example in examples for label in example.labels[1:])
