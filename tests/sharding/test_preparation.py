"""What several ranks prepare together: the values of one process; the first rank's where ranks compute otherwise."""

import json
from pathlib import Path

import pytest
import torch
from torch import distributed

from moe_unlearn import seuf, trace
from moe_unlearn.prepare import stages
from moe_unlearn.prepare.stages import Preparation, prepare
from moe_unlearn.ranks import Ranks
from tests.support.forked_ranks import run_forked
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
    losses, solve = stages.token_losses, trace.retain_weights

    def rounded(*arguments, **keywords):
        solved = solve(*arguments, **keywords)
        for values in (solved.weights, solved.achieved, solved.tilt):
            values.mul_(1 + 1e-5)
        return trace.RetainWeights(solved.weights, solved.ess + 1, solved.achieved, solved.tilt, solved.bias + 1)

    patch.setattr(stages, "token_losses", lambda *a, **k: losses(*a, **k) * (1 + 1e-5))
    patch.setattr(trace, "retain_weights", rounded)


def found_by(rank: int, folder: Path) -> None:
    ranks = Ranks(model(), distributed.group.WORLD)
    found = {name: numbers_of(name, ranks) for name in RECIPES}
    with pytest.MonkeyPatch.context() as patch:
        if rank:
            as_another_processor(patch)
        found |= {f"{name} elsewhere": numbers_of(name, ranks) for name in RECIPES}
    (folder / f"rank{rank}.json").write_text(json.dumps(found), encoding="utf-8")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two ranks has found."""
    folder = tmp_path_factory.mktemp("preparation")
    assert run_forked(2, folder, lambda rank: found_by(rank, folder)) == [0, 0]
    return [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_ranks_prepare_the_numbers_of_one_process(name, two):
    assert two[0][name] == two[1][name] == json.loads(json.dumps(numbers_of(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_ranks_that_compute_otherwise_decide_alike(name, two):
    assert two[0][f"{name} elsewhere"] == two[1][f"{name} elsewhere"]
