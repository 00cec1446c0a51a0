"""Several ranks prepare the values of one process; the first rank's where ranks compute otherwise."""

import json
import weakref
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError
from torch import distributed
from torch.distributed.fsdp import fully_shard

from moe_unlearn import masks, seuf, trace
from moe_unlearn.prepare import reference, stages
from moe_unlearn.prepare.preparation import Preparation
from moe_unlearn.prepare.rows import RowStore
from moe_unlearn.prepare.stages import prepare
from moe_unlearn.ranks import RankError, Ranks
from tests.support.batches import random_batches
from tests.support.forked_ranks import found_on
from tests.support.models import tiny_olmoe
from tests.support.steps import VOCAB, data, recipe

RECIPES = {"kl floor": ("mollm",), "calibration": ("trace",), "seuf": ("seuf",)}


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return tiny_olmoe(VOCAB).eval()


def numbers_of(name: str, ranks: Ranks | None = None) -> dict:
    """The numbers that a preparation has computed and that decide something later."""
    prepared, (base, *changes) = Preparation(), RECIPES[name]
    with pytest.MonkeyPatch.context() as patch:
        affinities: list = []
        select = seuf.select
        patch.setattr(seuf, "select", lambda score: select(affinities.append(score.tolist()) or score))
        prepare(model(), recipe(base, *changes), prepared, *data(), ranks=ranks)
    found = {"kl_floor": prepared.kl_floor, "affinities": affinities}
    if prepared.calibration is not None:
        rule = prepared.calibration
        found |= {"tilt": rule.tilt.tolist(), "achieved": rule.achieved.tolist()}
        found |= {"rest": [rule.bias, rule.ess, rule.largest_weight]}
        found["weights"] = [prepared.token_weights.get(batch).tolist() for batch in data()[1]]
    return found


def as_another_processor(patch: pytest.MonkeyPatch) -> None:
    """Let what this rank computes differ in a few bits."""
    losses, solve = stages.token_losses, trace.weights_of_hits

    def rounded(*arguments, **keywords):
        solved = solve(*arguments, **keywords)
        for values in (solved.weights, solved.achieved, solved.tilt):
            values.mul_(1 + 1e-5)
        return trace.RetainWeights(solved.weights, solved.ess + 1, solved.achieved, solved.tilt, solved.bias + 1)

    patch.setattr(stages, "token_losses", lambda *a, **k: losses(*a, **k) * (1 + 1e-5))
    patch.setattr(trace, "weights_of_hits", rounded)


def passes_of(cache: Path, ranks: Ranks | None = None) -> int:
    """How many batches this rank computes for the references of NPO."""
    made, seen = model(), []
    made.model.register_forward_hook(lambda *_: seen.append(None))
    prepare(made, recipe("npo"), Preparation(), *data(), cache_dir=cache, ranks=ranks)
    return len(seen)


def refused(cache: Path, rank: int, ranks: Ranks) -> list[str]:
    """Return what each rank says where the first one's disk fails, in what it writes and in what it reads."""
    said = []
    for name, error in (("write", SafetensorError("no space left")), ("read", PermissionError("not yours"))):
        with pytest.MonkeyPatch.context() as patch:
            if not rank:
                patch.setattr(RowStore, name, Mock(side_effect=error))
            try:
                passes_of(cache / name, ranks)
            except (RankError, OSError, SafetensorError) as raised:
                said.append(f"{type(raised).__name__}: {raised}")
    return said


def without_memory(rank: int, ranks: Ranks) -> list[str]:
    """Return what a rank says where the second one fails in a forward pass, by the stage that makes it."""
    said = []
    for name, where in (("npo", stages), ("trace", trace), ("seuf", seuf)):
        with pytest.MonkeyPatch.context() as patch:
            if rank:
                run = "token_losses" if name == "npo" else "final_hidden_states"
                patch.setattr(where, run, Mock(side_effect=MemoryError("none is left")))
            try:
                prepare(model(), recipe(name), Preparation(), *data(), ranks=ranks)
            except (RankError, MemoryError) as raised:
                said.append(f"{type(raised).__name__}: {raised}")
    return said


def damaged_mask(rank: int, ranks: Ranks) -> str:
    """Return what a rank says where the second one cannot read the mask that the recipe names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "load", Mock(side_effect=ValueError("damaged") if rank else None))
        try:
            prepare(model(), recipe("wagle", "wagle.mask=file"), Preparation(), *data(), ranks=ranks)
        except (RankError, ValueError) as raised:
            return f"{type(raised).__name__}: {raised}"
    return "none"


def other_state(rank: int) -> list[str]:
    """Return what a rank says where the second one has prepared other rows of sharded weights, and other stages."""
    said = []
    cases = (
        (fully_shard(model()), {"rows": {"forget": [], "refusals": [], "retain": []}}),
        (model(), {"done": ["trace"]}),
    )
    for made, before in cases:
        ranks = Ranks(made, distributed.group.WORLD)
        try:
            prepare(made, recipe("npo"), Preparation(**before if rank else {}), *data(), ranks=ranks)
        except (RankError, ValueError) as raised:
            said.append(f"{type(raised).__name__}: {raised}")
    return said


def digested(ranks: Ranks) -> list:
    """The digest of a model, and how many of its tensors this rank has read for it."""
    with pytest.MonkeyPatch.context() as patch:
        read = Mock(side_effect=reference.tensor_digest)
        patch.setattr(reference, "tensor_digest", read)
        return [reference.model_digest(model(), ranks=ranks), read.call_count]


def streamed(ranks: Ranks) -> list:
    """Statistics of batches that are made when they are asked for, and how many of them existed at the same time."""
    made: list[weakref.ref] = []
    most = 0

    def batches():
        nonlocal most
        for batch in random_batches(VOCAB, 7):
            ids = batch["input_ids"].clone()
            made.append(weakref.ref(ids))
            most = max(most, sum(each() is not None for each in made))
            yield batch | {"input_ids": ids}
            del ids

    found = trace.routing_frequencies(model(), batches(), ranks)
    return [found.counts.tolist(), found.tokens, most]


def found_by(rank: int, folder: Path) -> dict:
    ranks = Ranks(model(), distributed.group.WORLD)
    found = {name: numbers_of(name, ranks) for name in RECIPES}
    with pytest.MonkeyPatch.context() as patch:
        if rank:
            as_another_processor(patch)
        found |= {f"{name} elsewhere": numbers_of(name, ranks) for name in RECIPES}
    found["passes"] = [passes_of(folder / f"cache{rank}", ranks) for _ in range(2)]
    found["refused"], found["state"] = refused(folder, rank, ranks), other_state(rank)
    found["memory"] = without_memory(rank, ranks)
    found["mask"] = damaged_mask(rank, ranks)
    found["digest"], found["statistics"] = digested(ranks), streamed(ranks)
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Return what each of two ranks has found."""
    folder = tmp_path_factory.mktemp("preparation")
    passes_of(folder / "cache1")  # a disk of the second rank's own, on which all is stored
    return found_on(2, folder, lambda rank: found_by(rank, folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_ranks_prepare_the_numbers_of_one_process(name, two):
    assert two[0][name] == two[1][name] == json.loads(json.dumps(numbers_of(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_ranks_that_compute_otherwise_decide_alike(name, two):
    assert two[0][f"{name} elsewhere"] == two[1][f"{name} elsewhere"]


@pytest.mark.slow
def test_references_that_any_rank_has_on_its_disk_are_not_computed_again(two):
    assert [found["passes"] for found in two] == [[0, 0], [0, 0]]


@pytest.mark.slow
def test_a_disk_that_fails_ends_all_ranks(two):
    first, second = (found["refused"] for found in two)
    assert first == ["SafetensorError: no space left", "PermissionError: not yours"]
    assert second == [f"RankError: rank 0 stopped: {error}" for error in first]


@pytest.mark.slow
def test_ranks_that_have_prepared_otherwise_before_all_refuse(two):
    first, second = (found["state"] for found in two)
    assert second[0].startswith("ValueError: row 0 of the forget rows is none of the 0 that prepare() saw before")
    assert first[0] == f"RankError: rank 1 stopped: {second[0]}"
    differ = "ValueError: expected the stages that prepare() has run to be the same on all 2 ranks; they differ"
    assert first[1:] == second[1:] == [differ]


@pytest.mark.slow
def test_a_rank_without_memory_ends_all(two):
    error = "MemoryError: none is left"
    assert [found["memory"] for found in two] == [[f"RankError: rank 1 stopped: {error}"] * 3, [error] * 3]


@pytest.mark.slow
def test_a_mask_that_one_rank_cannot_read_ends_all(two):
    assert [found["mask"] for found in two] == ["RankError: rank 1 stopped: ValueError: damaged", "ValueError: damaged"]


@pytest.mark.slow
def test_ranks_read_the_weights_for_a_digest_in_turns(two):
    (digest, read), (other, read_there) = (found["digest"] for found in two)
    assert digest == other == reference.model_digest(model())
    assert abs(read - read_there) <= 1 and read + read_there == len({*model().parameters(), *model().buffers()})


@pytest.mark.slow
def test_ranks_hold_as_many_batches_of_their_statistics_as_they_are(two):
    expected = trace.routing_frequencies(model(), random_batches(VOCAB, 7))
    for counts, tokens, most in (found["statistics"] for found in two):
        assert counts == expected.counts.tolist() and tokens == expected.tokens and most <= 3
