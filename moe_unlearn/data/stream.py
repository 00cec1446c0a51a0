"""Share examples between ranks, for data in memory and for streams larger than it."""

import itertools
import random
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn.data.chats import Chat
from moe_unlearn.data.corpus import Document
from moe_unlearn.data.selection import DataReport
from moe_unlearn.data.tokenize import Example, generator, iter_examples

ENDS = ("repeat", "drop", "uneven")


def shard(
    length: int, rank: int, world_size: int, *, seed: int | None = None, epoch: int = 0, ends: str = "repeat"
) -> list[int]:
    """Return the positions, out of `length` examples, that `rank` of `world_size` ranks works on.

    Position j of the order (shuffled by `seed` and `epoch`, else unchanged) goes to rank j mod world_size. Where
    the length does not divide evenly, `ends="repeat"` gives all ranks the same number by starting again from the
    beginning of the order, as torch's DistributedSampler does; "drop" leaves the rest out; "uneven" gives every
    example to exactly one rank (for evaluation: collectives must not count on equal numbers).

    Raises ValueError for a rank outside 0 <= rank < world_size, another `ends`, or a length below 1.
    """
    _check(rank, world_size, ends)
    if length < 1:
        raise ValueError(f"expected at least one example to share; got {length}")
    order = list(range(length))
    if seed is not None:
        order = torch.randperm(length, generator=generator(seed, epoch)).tolist()
    if ends == "repeat":
        order = list(itertools.islice(itertools.cycle(order), -(-length // world_size) * world_size))
    elif ends == "drop":
        order = order[: length // world_size * world_size]
    return order[rank::world_size]


class ExampleStream(IterableDataset):
    """Stream of (example, number) pairs, one rank's share of documents that do not fit in memory.

    The numbers count the examples of the whole stream, so a number names the same example on every rank. Every rank
    reads all of the documents and keeps every world_size-th example; `ends` is as in `shard`, and the workers of a
    DataLoader divide their rank's share. With `shuffle_buffer` > 1, examples leave a buffer of that many in random
    order, before they are shared; the order depends on `seed` and epoch (`set_epoch`) and is alike on all ranks.
    `report` is filled only where there are no workers.

    The memory needed is the buffer, and with `ends="repeat"` the first world_size examples. Collate with
    `collate(*zip(*rows))`. Raises ValueError as `shard` and `iter_examples` do.
    """

    def __init__(
        self,
        documents: Iterable[Document],
        tokenizer: Tokenizer,
        max_length: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle_buffer: int = 1,
        ends: str = "repeat",
        overflow: str = "split",
        chat: bool | Chat = False,
        seam: str = "joint",
        report: DataReport | None = None,
    ):
        _check(rank, world_size, ends)
        if shuffle_buffer < 1:
            raise ValueError(f"expected a shuffle_buffer of at least 1; got {shuffle_buffer}")
        self.documents, self.tokenizer, self.max_length = documents, tokenizer, max_length
        self.rank, self.world_size, self.ends = rank, world_size, ends
        self.seed, self.shuffle_buffer, self.epoch = seed, shuffle_buffer, 0
        self.encoding: dict[str, Any] = {"overflow": overflow, "chat": chat, "seam": seam, "report": report}

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which decides the order of the next pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Example, int]]:
        examples = iter_examples(self.documents, self.tokenizer, self.max_length, **self.encoding)
        numbered = ((example, number) for number, example in enumerate(examples))
        own = _share(self._shuffled(numbered), self.rank, self.world_size, self.ends)
        worker = get_worker_info()
        return own if worker is None else itertools.islice(own, worker.id, None, worker.num_workers)

    def _shuffled(self, items: Iterator) -> Iterator:
        if self.shuffle_buffer == 1:
            yield from items
            return
        draw = random.Random(f"{self.seed} {self.epoch}")
        buffer = list(itertools.islice(items, self.shuffle_buffer))
        for item in items:
            place = draw.randrange(len(buffer))
            yield buffer[place]
            buffer[place] = item
        draw.shuffle(buffer)
        yield from buffer


def _share(items: Iterator, rank: int, world_size: int, ends: str) -> Iterator:
    first: list = []
    while group := list(itertools.islice(items, world_size)):
        first = first or group
        if len(group) < world_size and ends == "repeat":
            group = list(itertools.islice(itertools.chain(group, itertools.cycle(first)), world_size))
        if rank < len(group) and (len(group) == world_size or ends == "uneven"):
            yield group[rank]


def _check(rank: int, world_size: int, ends: str) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"expected 0 <= rank < world_size; got rank {rank} of {world_size}")
    if ends not in ENDS:
        raise ValueError(f"expected ends {', '.join(ENDS)}; got {ends!r}")
