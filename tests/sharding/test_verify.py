"""Two ranks verify their steps against the plain step of one process: with whole weights, under FSDP2 and EP."""

import pytest

from tests.support import verify_child
from tests.support.forked_ranks import found_on
from tests.support.verify_child import FAULTS, NAMES

VERIFIED = [f"{engine} {name}" for engine, names in NAMES.items() for name in names]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return what both have found."""
    folder = tmp_path_factory.mktemp("verified")
    return found_on(2, folder, lambda rank: verify_child.found_by(rank, folder))


@pytest.mark.slow
@pytest.mark.parametrize("case", VERIFIED)
def test_steps_of_ranks_equal_the_plain_steps_of_one_process(case, ranks):
    first, second = (found[case] for found in ranks)
    assert first["report"] == second["report"] and first["report"].count("equals the plain step") == 2
    # one process meets the rows of both: two of the first micro-batches' and one of the second's
    assert " of 0 routes" not in first["report"]
    assert all(step["verify_difference"] > 0 for step in first["metrics"])
    assert first["metrics"] == second["metrics"] and first["same"] and second["same"]
    # the first rank alone makes replays
    assert [found[case]["twin"] for found in ranks] == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("fault,engine", [(f, e) for f in ("one gradient", "no gradient") for e in FAULTS[f]])
def test_a_gradient_that_is_wrong_or_lost_on_one_rank_ends_both(fault, engine, ranks):
    said = ended(ranks, f"{engine} {fault}")
    assert said[0] == said[1] and "0 steps done, weights and optimizer as before this" in said[0]
    assert "VerificationError: step 1: NOT the plain step" in said[0]
    assert "above the criterion: gradient of model.layers.1.mlp.experts.down_proj: pooled row" in said[0]


@pytest.mark.slow
def test_ranks_that_part_end_both(ranks):
    """The first rank's own weights are those of one process."""
    said = ended(ranks, "whole one update")
    assert said[0] == said[1] and said[0].startswith("VerificationError")
    assert "weight model.layers.1.mlp.experts.down_proj: rank 1 has other bits than rank 0" in said[0]
    assert "pooled row" not in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("engine", FAULTS["one draws"])
def test_random_numbers_that_one_rank_draws_end_both(engine, ranks):
    said = ended(ranks, f"{engine} one draws")
    assert said[1].startswith("ValueError: expected a forward pass without random numbers")
    assert said[0] == f"RankError: rank 1 stopped: {said[1]}"


@pytest.mark.slow
def test_a_plain_path_that_stops_on_the_first_rank_ends_both(ranks):
    said = ended(ranks, "fsdp one stops")
    assert said[0] == said[1] and "the plain path stops" in said[0] and "the gradient norm is nan" in said[0]


@pytest.mark.slow
def test_a_mixed_precision_of_the_engine_is_refused_by_name(ranks):
    for found in ranks:
        assert found["narrow"].startswith("verify is for ranks that compute in the dtype of the weights; FSDP2 was")


def ended(ranks, case):
    """The errors of both, which have left everything as before the step."""
    for found in ranks:
        assert found[case]["undone"] and not found[case]["state"] and not found[case]["steps"]
    return [found[case]["error"] for found in ranks]
