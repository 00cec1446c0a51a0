"""The mask that several ranks make of the batches they share, against that of one process: the bytes of its file."""

import weakref
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from transformers.distributed import DistributedConfig

from moe_unlearn import masks, wagle
from moe_unlearn.masks import weight_mask
from moe_unlearn.masks.weight_mask import WeightMask
from moe_unlearn.model.batches import target_mask
from moe_unlearn.model.head import token_losses
from moe_unlearn.ranks import RankError, Ranks
from moe_unlearn.sharding import held_rows, is_sharded, part
from moe_unlearn.wagle import mask as making
from moe_unlearn.wagle.gradients import Side
from moe_unlearn.wagle.pieces import Piece, all_pieces
from tests.support.batches import random_batch, random_batches
from tests.support.forked_ranks import found_on
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


#: masks of sharded weights in groups; among the given gradients many are equal, and a fifth are zero
GIVEN: dict[str, dict] = {
    "few": {"share": 0.6},
    "many": {"share": 0.3, "keep": 0.7},
    "filled": {"share": 0.4, "keep": 0.95, "official": True},
}

BATCHES = [random_batch(VOCAB, rows=3, seed=1), random_batch(VOCAB, rows=1, length=7, seed=2)], random_batches(VOCAB, 5)


def mask_of(
    made: nn.Module, ranks: Ranks | None = None, loss: Callable = loss, memory: int | None = None
) -> WeightMask:
    return wagle.mask_of(made, *BATCHES, wagle.Rule(0.3, 0.7), losses=(loss, loss), ranks=ranks, memory=memory)


def without_memory(made: nn.Module, batch: dict) -> torch.Tensor:
    raise MemoryError("none is left")


def given(made: nn.Module, side: Side, pieces: list[Piece], ranks: Ranks | None) -> dict:
    """Gradients that are the same whatever the ranks: those rows of them that this rank holds."""
    found = {}
    for piece in pieces:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{side.name} {piece.name}".encode()))
        rows, at = held_rows(piece.parameter), piece.elements
        # few values, so that many scores are equal
        whole = torch.randint(-2, 3, piece.parameter.shape, generator=generator) * torch.rand((), generator=generator)
        found[piece] = whole[rows.start : rows.stop].flatten()[at.start : at.stop : at.step]
    return found


def mask_of_given(made: nn.Module, share: float | None = None, **settings: object) -> WeightMask:
    """The mask of those gradients, within a share of what all of them take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(making, "gradients", given)
        return wagle.weight_mask(made, *BATCHES, **{"keep": 0.3, "gamma": 0.7} | settings, memory=budget(made, share))


def budget(made: nn.Module, share: float | None) -> int | None:
    return None if share is None else int(share * sum(piece.nbytes for piece in all_pieces(made, Ranks(made))))


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
    # too little on one rank for its rows: all make the mask in groups
    at_once, needed = len(passes), sum(piece.nbytes for piece in all_pieces(made, ranks))
    mask_of(made, ranks, memory=needed // 2 if rank == 0 else 1 << 40).save(folder / f"groups{rank}")
    assert len(passes) >= 4 * at_once
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
    for name, settings in GIVEN.items():
        mask_of_given(made, **settings).save(folder / name)
    with pytest.raises(ValueError, match="memory must be at least .* of a rank's rows of .* take; got 1000"):
        wagle.weight_mask(made, *BATCHES, keep=0.3, gamma=0.7, memory=1000)
    if distributed.get_world_size() > 2:
        return
    at_once = same_in_groups(made)
    at_once.save(folder / "summed")
    interrupted(made, folder, at_once)
    with_experts_of_their_own(folder)


def same_in_groups(made: nn.Module) -> WeightMask:
    """Return the mask that groups make and that one pass makes: an engine's sums depend on no other gradients."""
    passes, real = [], making._Scores.of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(making._Scores, "of", lambda *given: passes.append(given) or real(*given))
        at_once, in_groups = (
            wagle.weight_mask(made, *BATCHES, keep=0.3, gamma=0.7, memory=budget(made, share)) for share in (None, 0.5)
        )
    assert len(passes) > 3 and 0 < at_once.fraction <= 0.3 and at_once.magnitudes == in_groups.magnitudes
    for name, words in at_once.packed.items():
        assert torch.equal(part(words), part(in_groups.packed[name]))
    return at_once


def with_experts_of_their_own(folder: Path) -> None:
    """Ranks of which each has some experts whole, as transformers shares them out."""
    torch.manual_seed(0)
    made = tiny_olmoe(VOCAB)
    if distributed.get_rank() == 0:
        made.save_pretrained(folder / "model")
    distributed.barrier()
    config = DistributedConfig(fsdp_size=2, ep_size=2)
    settings = {"distributed_config": config, "experts_implementation": "moe_unlearn"}
    made = type(made).from_pretrained(folder / "model", **settings).eval()
    experts = made.model.layers[0].mlp.experts
    assert len(part(experts.down_proj)) == experts.down_proj.shape[0] // 2
    mask_of_given(made, **GIVEN["filled"]).save(folder / "experts")
    same_in_groups(made)


def interrupted(made: nn.Module, folder: Path, expected: WeightMask) -> None:
    """Ranks go on from the groups that all of them have kept: here the first one lost its last file."""
    rule, place, memory = wagle.Rule(0.3, 0.7), folder / "groups", budget(made, 0.5)
    with pytest.raises(ZeroDivisionError), wagle.Resume(place, lambda: "the model") as resume:
        wagle.mask_of(made, *BATCHES, rule, memory=memory, resume=resume)
        raise ZeroDivisionError
    names = sorted(path.name for path in place.rglob(f"rank {distributed.get_rank()} of */*"))
    if distributed.get_rank() == 0:
        next(place.rglob(f"rank 0 of */{names[-1]}")).unlink()
    computed, real = [], making._Scores.of
    with pytest.MonkeyPatch.context() as patch, wagle.Resume(place, lambda: "the model") as resume:
        patch.setattr(making._Scores, "of", lambda *given: computed.append(given) or real(*given))
        again = wagle.mask_of(made, *BATCHES, rule, memory=memory, resume=resume)
    assert len(names) > 2 and len(computed) == 1
    for name, words in expected.packed.items():
        assert torch.equal(part(words), part(again.packed[name]))
    distributed.barrier()
    assert not place.exists()


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
    found_on(request.param, folder, lambda rank: written_by(rank, folder))
    return request.param, folder


def test_ranks_with_whole_weights_write_the_mask_of_one_process(ranks, tmp_path):
    count, folder = ranks
    mask_of(model()).save(tmp_path / "one")
    for rank in range(count):
        assert (folder / f"whole{rank}").read_bytes() == (tmp_path / "one").read_bytes()
        assert (folder / f"groups{rank}").read_bytes() == (tmp_path / "one").read_bytes()


def test_ranks_with_sharded_weights_write_the_mask_that_equal_gradients_make_in_one_process(ranks, tmp_path):
    _, folder = ranks
    torch.manual_seed(0)
    mask_of_given(tiny_olmoe(VOCAB).eval()).save(tmp_path / "one")
    assert (folder / "given").read_bytes() == (tmp_path / "one").read_bytes()


def test_weights_that_fall_on_the_other_side_are_counted_and_next_to_the_threshold(ranks):
    """FSDP2 adds up five batches in pairs: what may differ from one process is within the rounding of these sums."""
    count, folder = ranks
    if count > 2:
        return  # which write no such mask
    torch.manual_seed(0)
    made = tiny_olmoe(VOCAB).eval()
    one = wagle.weight_mask(made, *BATCHES, keep=0.3, gamma=0.7)
    other = masks.load(folder / "summed", made)
    sums, bounds = [], []
    for side in BATCHES:
        tokens = sum(int(target_mask(batch).sum()) for batch in side)
        each = [torch.autograd.grad(token_losses(made, b).sum() / tokens, made.parameters()) for b in side]
        stacked = [torch.stack([g.double().flatten() for g in of_one]) for of_one in zip(*each, strict=True)]
        sums.append(torch.cat([s.sum(0) for s in stacked]))
        bounds.append(torch.cat([s.abs().sum(0) for s in stacked]) * len(side) * torch.finfo(torch.float32).eps)
    theta = torch.cat([p.detach().double().flatten() for p in made.parameters()])
    factor = theta - sums[1] / 0.7
    score = (factor * sums[0]).abs()
    moved = bounds[1] / 0.7 * sums[0].abs() + factor.abs() * bounds[0] + 4 * torch.finfo(torch.float32).eps * score
    threshold = score.sort(descending=True).values[int(0.3 * len(score)) - 1]
    within = (score - threshold).abs() <= moved + moved[(score - threshold).abs() <= moved].max()
    differ = torch.cat([(one.kept(name) ^ other.kept(name)).flatten() for name in one.names])
    assert int(differ.sum()) == sum(one.differing(other).values())
    assert not (differ & ~within).any() and int(within.sum()) < 50


def test_sharded_weights_in_groups_too_whatever_the_guess_with_ties_and_zeros(ranks, tmp_path):
    count, folder = ranks
    torch.manual_seed(0)
    made = tiny_olmoe(VOCAB).eval()
    for name, settings in GIVEN.items():
        mask_of_given(made, **settings | {"share": None}).save(tmp_path / "one")
        assert (folder / name).read_bytes() == (tmp_path / "one").read_bytes(), name
    if count == 2:
        assert (folder / "experts").read_bytes() == (folder / "filled").read_bytes()
