"""Sharing between ranks: everything once, equal numbers where asked, the same whatever the workers."""

import itertools
from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from moe_unlearn.data import Document, ExampleStream, collate, encode, load, shard, train_tokenizer

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 16, 21])
@pytest.mark.parametrize("seed", [None, 3])
def test_shards(length, world_size, seed):
    def shares(ends):
        return [shard(length, rank, world_size, seed=seed, ends=ends) for rank in range(world_size)]

    assert sorted(itertools.chain(*shares("uneven"))) == list(range(length))
    assert {len(share) for share in shares("uneven")} <= {length // world_size, -(-length // world_size)}
    assert {len(share) for share in shares("repeat")} == {-(-length // world_size)}
    assert set(itertools.chain(*shares("repeat"))) == set(range(length))
    assert {len(share) for share in shares("drop")} == {length // world_size}
    assert max(Counter(itertools.chain(*shares("drop"))).values(), default=1) == 1
    if seed is None:
        for ends in ("repeat", "drop"):
            for rank, share in enumerate(shares(ends)):
                sampler = DistributedSampler(range(length), world_size, rank, shuffle=False, drop_last=ends == "drop")
                assert share == list(sampler)


def test_shards_depend_on_seed_and_epoch_alone():
    torch.manual_seed(5)
    first = shard(50, 1, 2, seed=3, epoch=1)
    torch.manual_seed(6)
    assert shard(50, 1, 2, seed=3, epoch=1) == first
    assert len({tuple(shard(50, 0, 2, seed=s, epoch=e)) for s in range(3) for e in range(3)}) == 9


def test_bad_ranks_are_named():
    for rank, world_size in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=rf"0 <= rank < world_size; got rank {rank} of {world_size}"):
            shard(4, rank, world_size)
    with pytest.raises(ValueError, match="ends repeat, drop, uneven; got 'pad'"):
        shard(4, 0, 1, ends="pad")
    with pytest.raises(ValueError, match="at least one example to share; got 0"):
        shard(0, 0, 1)
    with pytest.raises(ValueError, match="shuffle_buffer of at least 1; got 0"):
        ExampleStream([], None, 8, shuffle_buffer=0)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["one two three"], 270)


DOCUMENTS = [Document("", "x" * (1 + i % 5)) for i in range(23)]


def numbers(tokenizer, workers=0, epoch=0, **options):
    stream = ExampleStream(DOCUMENTS, tokenizer, 16, **options)
    stream.set_epoch(epoch)
    loader = DataLoader(stream, batch_size=None, num_workers=workers)
    return [number for _, number in loader]


@pytest.mark.parametrize("ends", ["repeat", "drop", "uneven"])
@pytest.mark.parametrize("world_size", [1, 2, 4, 30])
def test_a_stream_is_shared_as_a_list_is(tokenizer, ends, world_size):
    if world_size > len(DOCUMENTS) and ends == "drop":
        assert numbers(tokenizer, rank=0, world_size=world_size, ends=ends) == []
        return
    for rank in range(world_size):
        expected = shard(len(DOCUMENTS), rank, world_size, ends=ends)
        assert numbers(tokenizer, rank=rank, world_size=world_size, ends=ends) == expected


def test_a_number_names_its_example(tokenizer):
    examples = encode(DOCUMENTS, tokenizer, 16)
    for example, number in ExampleStream(DOCUMENTS, tokenizer, 16, rank=1, world_size=3, shuffle_buffer=5):
        assert example == examples[number]


@pytest.mark.parametrize("shuffle_buffer", [1, 6, 100])
def test_shuffled_streams_hold_everything_once(tokenizer, shuffle_buffer):
    def all_ranks(**options):
        return [
            numbers(tokenizer, rank=r, world_size=3, ends="uneven", shuffle_buffer=shuffle_buffer, **options)
            for r in range(3)
        ]

    assert sorted(itertools.chain(*all_ranks())) == list(range(len(DOCUMENTS)))
    assert all_ranks(seed=1, epoch=2) == all_ranks(seed=1, epoch=2)
    if shuffle_buffer > 1:
        orders = {str(all_ranks(seed=s, epoch=e)) for s in range(2) for e in range(2)}
        assert len(orders) == 4


def test_workers_share_what_their_rank_has(tokenizer):
    alone = numbers(tokenizer, rank=1, world_size=2)
    assert sorted(numbers(tokenizer, workers=2, rank=1, world_size=2)) == sorted(alone)


def test_a_file_larger_than_memory_is_a_stream_of_batches(write, tokenizer):
    path = write("a.jsonl", [{"text": "qz" * 40}] * 40)
    stream = ExampleStream(load(path, streaming=True), tokenizer, 32, rank=1, world_size=2)
    loader = DataLoader(stream, batch_size=4, collate_fn=lambda rows: collate(*zip(*rows, strict=True)))
    batch = next(iter(loader))
    assert batch["input_ids"].shape == (4, 32) and batch["index"].tolist() == [1, 3, 5, 7]
