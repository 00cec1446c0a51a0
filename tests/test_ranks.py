"""Two ranks make the step that one process makes of both their batches."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from moe_unlearn.ranks import Ranks, shared_work, turns
from moe_unlearn.step import UnlearnStep
from moe_unlearn.testing.yardstick import Reference
from tests.support import ranks_child
from tests.support.batches import random_batches
from tests.support.forked_ranks import found_on
from tests.support.ranks_child import CASES, STEPS, batches_of, made
from tests.support.steps import VOCAB, check_changes, data, made_of, recipe, weights


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder where both have left what they found, and that."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, *found_on(2, folder, lambda rank: ranks_child.found_by(rank, folder))


def alone(name, dtype=torch.float32, *, fused=True):
    """Weights and losses of one process to which the ranks' batches are micro-batches."""
    # what ranks add up is compact, whatever the recipe says
    settings, options, _ = made(name, *(["mollm.gradients=compact"] if name in ("mollm", "combined") else []))
    step = UnlearnStep(ranks_child.model().to(dtype), settings, fused=fused and options["fused"])
    step.prepare(*data())
    losses = []
    for i in range(STEPS):
        metrics = made_of(step, [batches_of(i, rank) for rank in range(2)])
        losses.append({key: value for key, value in metrics.items() if key.endswith(("_loss", "_alpha"))})
    return weights(step.model), losses


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_make_the_step_of_one(name, ranks):
    folder, *found = ranks
    ours, other = (load_file(folder / f"{name}-{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(ours[key], other[key]) for key in ours)
    assert found[0][name] == found[1][name]
    accumulated, losses = alone(name)
    reference = Reference(lambda: alone(name, fused=False)[0])
    gold, _ = alone(name, torch.float64, fused=False)
    check_changes(ranks_child.model(), ours, reference, gold, only_changed=True)
    for mine, expected in zip(found[0][name], losses, strict=True):
        assert {key: mine[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    assert all(torch.equal(ours[key], accumulated[key]) for key in ours)


@pytest.mark.slow
def test_two_ranks_train_what_one_trainer_does(ranks, tmp_path):
    folder, first, second = ranks
    ours, other = (load_file(folder / f"trainer-{rank}.safetensors") for rank in range(2))
    after, found = ranks_child.trained(tmp_path, gradient_accumulation_steps=2)
    assert first["trainer"] == second["trainer"]
    assert first["trainer"]["losses"] == pytest.approx(found["losses"], rel=1e-6)
    assert first["trainer"]["differing"] == found["differing"] == []
    assert all(torch.equal(ours[key], other[key]) and torch.equal(ours[key], after[key]) for key in ours)


@pytest.mark.slow
def test_ranks_that_round_otherwise_take_the_same_step(ranks):
    _, first, second = ranks
    assert first["elsewhere"] == second["elsewhere"]


@pytest.mark.slow
def test_what_one_rank_cannot_do_neither_does(ranks):
    _, first, second = ranks
    assert first["errors"] == second["errors"]
    for error, words in zip(
        first["errors"],
        (
            "NonFiniteError: forget_loss is nan, retain_loss is nan: stopped before the update",
            "NonFiniteError: the gradient norm is",
            "ValueError: expected the rows of prepare() to be the same on all 2 ranks; they differ",
            "ValueError: the model is in FullyShardedDataParallel (FSDP1)",
        ),
        strict=True,
    ):
        assert error.startswith(words)


@pytest.mark.slow
def test_a_cache_that_one_rank_cannot_make_ends_both(ranks):
    _, first, second = ranks
    assert second["cache"].startswith("FileExistsError: [Errno 17] cache_dir cannot be made a folder: it is a file")
    assert first["cache"] == f"RankError: rank 1 stopped: {second['cache']}"


@pytest.mark.quick
def test_one_process_speaks_to_nobody():
    alone = Ranks(torch.nn.Linear(1, 1))
    gradients = {"a": torch.ones(2), "b": None}
    alone.add_(gradients)
    alone.share_([gradients["a"]])
    assert alone.together(lambda: ("own", False), lambda: pytest.fail("nobody to compare with")) == ("own", False)
    assert alone.count == 1 and alone.first and alone.sums([1.5]) == [1.5]
    assert torch.equal(gradients["a"], torch.ones(2))


def sums_of(forget, retain, *, apart):
    """Gradients of two micro-batches, added up in one process, or each by itself first, as ranks do."""
    step = UnlearnStep(ranks_child.model(), recipe("npo"))
    step.prepare(forget, retain)
    pairs = [*zip(forget, retain, strict=True)]
    sizes, total = step.sizes(pairs), {}
    for pair in pairs:
        step.accumulate(*pair, sizes=sizes)
        if apart:
            own = {name: step.gradients.of(p) for name, p in step.view().trained}
            total = {name: total[name] + g if total else g.clone() for name, g in own.items()}
            step.discard()
    return total if apart else {name: step.gradients.of(p) for name, p in step.view().trained}


@pytest.mark.parametrize("longest,exact", [(12, True), (30, False)])
def test_ranks_have_the_bits_of_one_process_where_both_sides_share_a_pass(longest, exact):
    """One process adds the second pass of a micro-batch to all before it, a rank to its first pass alone."""
    forget, retain = (random_batches(VOCAB, 2, seed=i, length=length) for i, length in ((1, longest), (2, 12)))
    together, apart = (sums_of(forget, retain, apart=each) for each in (False, True))
    differing = [name for name in together if not torch.equal(together[name], apart[name])]
    # autograd adds up the passes of one backward pass by itself
    assert all(".experts." in name for name in differing) and bool(differing) is not exact
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, apart[name], rtol=0, atol=1e-6 * float(gradient.abs().max()))


@pytest.mark.quick
def test_ranks_take_turns_and_all_compute_as_many_batches():
    assert [*turns(range(3), None)] == [(0, True), (1, True), (2, True)]
    one, other = ([*turns(range(3), SimpleNamespace(count=2, rank=rank))] for rank in range(2))
    assert one == [(0, True), (2, True)] and other == [(1, True), (2, False)]
    assert [*turns([], None)] == []
    assert [*shared_work(lambda i: i, [1, 1], None)] == [(0, 0), (1, 1)]


@pytest.mark.quick
def test_the_plan_of_ranks_says_that_gradients_are_added_up():
    step = UnlearnStep(ranks_child.model(), recipe("graddiff", "guard=loss"))
    step.ranks.count = step.ranks.peers = 2
    forget, retain = data()
    plan = step.plan(forget, retain)
    assert {(path.way, path.reason) for path in plan.paths} == {("compact", "the gradients of 2 ranks are added up")}
    assert plan.memory["gradients"] > 0


def test_the_plan_of_ranks_has_their_part_of_wagles_gradients():
    step = UnlearnStep(ranks_child.model(), recipe("wagle"))
    trained = sum(p.numel() for p in step.model.parameters()) / 2**20
    shared = f" that 4 ranks share and that of a batch, {6 * trained:.2f} MiB beside the weights"
    for ranks, said in ((1, " of all weights at once: "), (4, shared)):
        step.ranks.count = step.ranks.peers = ranks
        assert any(f"from two float32 gradients{said}" in each for each in step.plan(*data()).notes)
