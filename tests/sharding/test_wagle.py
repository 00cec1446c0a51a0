"""The mask that several ranks make of the batches they share, against that of one process: the bytes of its file."""

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

from moe_unlearn import masks, wagle
from moe_unlearn.masks import weight_mask
from moe_unlearn.masks.weight_mask import WeightMask
from moe_unlearn.model.head import token_losses
from moe_unlearn.ranks import RankError, Ranks
from moe_unlearn.sharding import held_rows, is_sharded, part
from moe_unlearn.wagle import mask as making
from moe_unlearn.wagle.gradients import Side
from moe_unlearn.wagle.pieces import Piece
from tests.support.batches import random_batch, random_batches
from tests.support.forked_ranks import run_forked
from tests.support.models import tiny_olmoe
from tests.support.steps import VOCAB

pytestmark = pytest.mark.slow


def model() -> nn.Module:
    torch.manual_seed(0)
    made = tiny_olmoe(VOCAB).eval()
    # a scalar, and rows that no number of ranks shares out evenly
    made.scale, made.shift = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.randn(5, 3))
    return made


def loss(made: nn.Module, batch: dict) -> torch.Tensor:
    """Losses on which some parameters have no influence in some batches."""
    losses = token_losses(made, batch)
    return losses * made.scale + made.shift.sum().sin() * losses if len(batch["input_ids"]) > 2 else losses


BATCHES = [random_batch(VOCAB, rows=3, seed=1), random_batch(VOCAB, rows=1, length=7, seed=2)], random_batches(VOCAB, 5)


def mask_of(
    made: nn.Module, ranks: Ranks | None = None, loss: Callable = loss, memory: int | None = None
) -> WeightMask:
    return wagle.mask_of(made, *BATCHES, wagle.Rule(0.3, 0.7), losses=(loss, loss), ranks=ranks, memory=memory)


def without_memory(made: nn.Module, batch: dict) -> torch.Tensor:
    raise MemoryError("none is left")


def given(made: nn.Module, side: Side, pieces: list[Piece], ranks: Ranks | None) -> dict:
    """Gradients that are the same whatever the ranks: those rows of them that this rank holds."""
    generator = torch.Generator().manual_seed(len(side.name) + ord(side.name[0]))
    found = {}
    for piece in pieces:
        rows = held_rows(piece.parameter)
        # few values, so that many scores are equal
        whole = torch.randint(-2, 3, piece.parameter.shape, generator=generator) + torch.rand((), generator=generator)
        found[piece] = whole[rows.start : rows.stop].flatten()
    return found


def mask_of_given(made: nn.Module) -> WeightMask:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(making, "gradients", given)
        return wagle.weight_mask(made, *BATCHES, keep=0.3, gamma=0.7)


def written_by(rank: int, folder: Path) -> None:
    made = model()
    ranks = Ranks(made, distributed.group.WORLD)
    with pytest.raises(MemoryError if rank == 1 else RankError, match="none is left"):
        mask_of(made, ranks, loss=without_memory if rank == 1 else loss)
    passes = []
    made.register_forward_hook(lambda *_: passes.append(None))
    made.model.register_forward_hook(lambda *_: passes.append(None))
    mask = mask_of(made, ranks)
    mask.save(folder / f"whole{rank}")
    assert len(passes) == sum(len(side[rank :: distributed.get_world_size()]) for side in BATCHES)
    assert all(p.grad is None for p in made.parameters())
    # too little on one rank for its rows: each makes the mask alone, in groups
    memory = sum(p.numel() for p in made.parameters()) * (4 if rank == 0 else 1000)
    mask_of(made, ranks, memory=memory).save(folder / f"alone{rank}")
    assert len(passes) > sum(map(len, BATCHES)) * (3 if rank == 0 else 1)
    torch.manual_seed(0)
    made = tiny_olmoe(VOCAB).eval()
    for layer in made.model.layers:
        fully_shard(layer)
    made = fully_shard(made)
    mask = mask_of_given(made)
    assert held_while_saved(mask, folder / "given") == (1 if rank else sum(map(is_sharded, mask.packed.values())))
    masks.save(mask, folder / "official", made, "official")
    distributed.barrier()
    assert read_again(folder / "given", made, mask) == 1
    read_again(folder / "official", made, mask)
    with pytest.raises(ValueError, match="memory: expected none where ranks share weights out, .*; got '1GiB'"):
        wagle.weight_mask(made, *BATCHES, keep=0.3, gamma=0.7, memory="1GiB")


def held_while_saved(mask: WeightMask, path: Path) -> int:
    """How many matrices of words a rank has whole when a mask that ranks share is written."""
    found: list[weakref.ref] = []
    alive: list[int] = []

    def whole(self: WeightMask, name: str) -> torch.Tensor:
        words = unwatched(self, name)
        if is_sharded(self.packed[name]):
            found.append(weakref.ref(words))
        return words

    def written(write: Callable) -> None:
        alive.append(sum(each() is not None for each in found))
        on_first(write)

    with pytest.MonkeyPatch.context() as patch:
        unwatched, on_first = WeightMask.words, weight_mask.on_first
        patch.setattr(WeightMask, "words", whole)
        patch.setattr(weight_mask, "on_first", written)
        mask.save(path)
    return alive[0]


def read_again(path: Path, made: nn.Module, mask: WeightMask) -> int:
    """How many matrices of words a rank had whole at a time while it read a mask of which it keeps its rows."""
    found: list[weakref.ref] = []
    most = 0

    def watched(name: str, shape: tuple, words: torch.Tensor) -> None:
        nonlocal most
        if not is_sharded(words) and words.dim() > 1:
            found.append(weakref.ref(words))
        most = max(most, sum(each() is not None for each in found))
        check(name, shape, words)

    with pytest.MonkeyPatch.context() as patch:
        check = weight_mask._check_words
        patch.setattr(weight_mask, "_check_words", watched)
        again = masks.load(path, made)
    for name, words in mask.packed.items():
        assert is_sharded(again.packed[name]) is is_sharded(words)
        own = part(again.packed[name])
        assert torch.equal(own, part(words)) and own.untyped_storage().nbytes() == own.nbytes
    return most


@pytest.fixture(scope="module", params=[2, 3, 4])
def ranks(request, tmp_path_factory):
    """How many ranks there were, and the folder with the files that they wrote."""
    folder = tmp_path_factory.mktemp("masks")
    assert run_forked(request.param, folder, lambda rank: written_by(rank, folder)) == [0] * request.param
    return request.param, folder


def test_ranks_with_whole_weights_write_the_mask_of_one_process(ranks, tmp_path):
    count, folder = ranks
    mask_of(model()).save(tmp_path / "one")
    for rank in range(count):
        assert (folder / f"whole{rank}").read_bytes() == (tmp_path / "one").read_bytes()
        assert (folder / f"alone{rank}").read_bytes() == (tmp_path / "one").read_bytes()


def test_ranks_with_sharded_weights_write_the_mask_that_equal_gradients_make_in_one_process(ranks, tmp_path):
    _, folder = ranks
    torch.manual_seed(0)
    mask_of_given(tiny_olmoe(VOCAB).eval()).save(tmp_path / "one")
    assert (folder / "given").read_bytes() == (tmp_path / "one").read_bytes()
