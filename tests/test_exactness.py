"""The fused step equals the plain one: a pairwise cover of objectives, levers, optimizers, families and ways."""

import random

import pytest

from tests.support import covers, exactness
from tests.support.exactness import AXES, Subject, check_bits, check_free_running, check_steps, named
from tests.support.threads import torch_threads

COVER = exactness.pairwise_cover()
# together they have every lever, both optimizers, all families and both dtypes
DRAW = random.Random(0)
RUNS = [
    covers.complete(
        {"lever": lever, "optimizer": optimizer, "family": family, "dtype": dtype}, AXES, DRAW, exactness.allowed
    )
    for lever, optimizer, family, dtype in (
        ("trace", "adamw", "gpt_oss", "float32"),
        ("wagle", "sgd", "olmoe", "bfloat16"),
        ("mollm", "adamw", "qwen3_moe", "float32"),
        ("all", "adamw", "olmoe", "bfloat16"),
    )
]
PLAIN = {
    "objective": "graddiff",
    "lever": "trace",
    "optimizer": "adamw",
    "family": "olmoe",
    "guard": "loss",
    "dtype": "float32",
    "accumulate": 1,
    "checkpointing": False,
    "clip": None,
    "momentum": 0.0,
    "scope": "all",
    "impl": "auto",
}
TINIEST = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_experts": 4}


@pytest.fixture(autouse=True)
def one_thread():
    with torch_threads(1):
        yield


@pytest.mark.quick
def test_the_cover_has_every_two_settings_that_go_together():
    covered = set().union(*(covers.pairs(case, AXES) for case in COVER))
    assert covered == covers.all_pairs(AXES, exactness.allowed)
    assert all(exactness.allowed(case) and case.keys() == AXES.keys() for case in COVER)
    assert len(COVER) <= 40 and exactness.pairwise_cover() == COVER


@pytest.mark.quick
def test_the_full_matrix_has_every_objective_with_every_lever_it_goes_with():
    cases = list(exactness.full_matrix())
    keys = {tuple(case[axis] for axis in exactness.MATRIX) for case in cases}
    assert len(keys) == len(cases) == (8 * 4 - 4) * 2 * 3


@pytest.mark.parametrize("case", COVER, ids=named)
def test_steps(case, monkeypatch):
    monkeypatch.setenv("MOE_UNLEARN_IMPL", case["impl"])
    found = check_steps(Subject(case), 3)
    assert found["steps"] == 3 and found["not_compared"] == 0


@pytest.mark.quick
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lever": "all", "objective": "npo", "guard": "strict", "dtype": "bfloat16"},
        {"lever": "wagle", "optimizer": "sgd", "family": "gpt_oss", "momentum": 0.9},
    ],
    ids=["update", "compact", "masked update"],
)
@pytest.mark.slow(but=1)
def test_a_few_steps(changes):
    assert check_steps(Subject(PLAIN | changes), 2)["not_compared"] == 0


@pytest.mark.parametrize("case", RUNS, ids=named)
def test_a_run_on_its_own_stays_as_close_as_rounding_lets_it(case):
    check_free_running(Subject(case), 8)


@pytest.mark.parametrize("case", RUNS, ids=named)
def test_runs_again_and_resumed_have_the_same_bits(case):
    check_bits(Subject(case), 4)


def test_two_steps_on_triton(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("MOE_UNLEARN_IMPL", "triton")
    subject = Subject(PLAIN | {"lever": "wagle"}, **TINIEST)
    subject.forget, subject.retain = (
        [{k: v[:2, :8] for k, v in b.items()} for b in side] for side in (subject.forget, subject.retain)
    )
    assert check_steps(subject, 2)["not_compared"] == 0
