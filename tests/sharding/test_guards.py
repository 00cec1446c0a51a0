"""What one rank alone refuses, or finds not to be finite, ends the step of all: no weight moves, none waits in vain."""

import pytest
import torch
from torch import distributed, nn
from transformers.distributed import DistributedConfig

from moe_unlearn.step import UnlearnStep
from moe_unlearn.step.objectives import Objectives
from tests.support.forked_ranks import found_on
from tests.support.sharded_child import batches_of, model, shard, weights_of
from tests.support.steps import VOCAB, data, recipe

pytestmark = pytest.mark.slow


def experts(folder) -> nn.Module:
    """The model of two ranks that have half of the experts each."""
    config = DistributedConfig(fsdp_size=2, ep_size=2)
    return type(model()).from_pretrained(folder / "model", distributed_config=config).eval()


ENGINES = {"whole weights": lambda folder: model(), "FSDP2": lambda folder: shard(model()), "experts": experts}


class NotFinite(Objectives):
    """Losses that are all NaN."""

    def __call__(self, *args, **options):
        return {name: value * float("nan") for name, value in super().__call__(*args, **options).items()}


def without(batch, key):
    return {name: value for name, value in batch.items() if name != key}


# each is called on both ranks with a prepared step and the rank's number, and the second rank alone has cause to stop


def bad_loss(step, rank):
    step.objectives.__class__ = NotFinite if rank else Objectives
    try:
        step(*batches_of(0, rank, 2))
    finally:
        step.objectives.__class__ = Objectives


def bad_gradient(step, rank):
    def spoil(module, args, output):
        if rank:
            output.register_hook(lambda g: g * float("inf"))

    handle = step.model.model.layers[0].register_forward_hook(spoil)
    try:
        step(*batches_of(0, rank, 2))
    finally:
        handle.remove()


def bad_batch(step, rank):
    forget, retain = batches_of(0, rank, 2)
    step(without(forget, "labels") if rank else forget, retain)


def unknown_row(step, rank):
    forget, retain = batches_of(0, rank, 2)
    forget = without(forget, "index")
    step(forget | {"input_ids": (forget["input_ids"] + rank) % VOCAB}, retain)


def other_sizes(step, rank):
    pair = batches_of(0, rank, 2)
    step(*pair, sizes={unit: count + rank for unit, count in step.sizes([pair]).items()})


def a_step_behind(step, rank):
    """What an error after the last collective of a step may leave."""
    step.steps += rank
    try:
        step(*batches_of(0, rank, 2))
    finally:
        step.steps -= rank


def other_last(step, rank):
    step(*batches_of(0, rank, 2), update=not rank)


def no_json(step, rank):
    pair = batches_of(0, rank, 2)
    step(*pair, sizes={unit: torch.tensor(count) if rank else count for unit, count in step.sizes([pair]).items()})


def nothing_to_count(step, rank):
    step.sizes([batches_of(0, rank, 2)][rank:])


def other_stages(step, rank):
    step.prepare(*data(), stages=("reference", "wagle")[: 1 + rank])


def bad_preparation(step, rank):
    forget, retain = data()
    step.prepare([without(batch, "labels") if rank else batch for batch in forget], retain)


def unprepared(step, rank):
    done = [*step.prepared.done]
    if rank:
        step.prepared.done.clear()
    try:
        step(*batches_of(0, rank, 2))
    finally:
        step.prepared.done[:] = done


def nobody_owns(step, rank):
    """The mutant: without the table of owners the sink must not drop the gradients of experts silently."""
    owners, step.shards.owners = step.shards.owners, None
    try:
        step(*batches_of(0, rank, 2))
    finally:
        step.shards.owners = owners


FINITE = "NonFiniteError: forget_loss is nan", "NonFiniteError: the gradient norm is"
SAMES = ("`sizes`", "`last`", "`stages`", "the number of steps done")
SAME = [f"ValueError: expected {what} to be the same" for what in SAMES]
# recipe, what is done, how the errors of both ranks begin; of what one rank alone finds, the other's says so
CASES = {
    "a loss": ("graddiff", bad_loss, (FINITE[0],) * 2),
    "a gradient": ("graddiff", bad_gradient, (FINITE[1],) * 2),
    "a batch": ("graddiff", bad_batch, ("RankError: rank 1 stopped: ValueError: ", "ValueError: ")),
    "a row": ("npo", unknown_row, ("RankError: rank 1 stopped: ValueError: reference", "ValueError: reference")),
    "sizes": ("graddiff", other_sizes, (SAME[0],) * 2),
    "the last micro-batch": ("graddiff", other_last, (SAME[1],) * 2),
    "the steps done": ("graddiff", a_step_behind, (SAME[3],) * 2),
    "sizes that are no JSON": ("graddiff", no_json, ("RankError: rank 1 stopped: TypeError: ", "TypeError: ")),
    "nothing to count": ("graddiff", nothing_to_count, ("RankError: rank 1 stopped: ValueError: ", "ValueError: ")),
    "stages": ("graddiff", other_stages, (SAME[2],) * 2),
    "rows of the preparation": ("npo", bad_preparation, ("RankError: rank 1 stopped: ValueError: ", "ValueError: ")),
    "the preparation": ("npo", unprepared, ("RankError: rank 1 stopped: NotPrepared", "NotPreparedError: ")),
}
OWNERS = {"the owners": ("graddiff", nobody_owns, ("RuntimeError: the backward pass made a gradient of a weight",) * 2)}


def cases(engine):
    return CASES | OWNERS if engine == "FSDP2" else CASES


def attempted(step, act, rank):
    """The error of a rank, the weights that moved, and the loss of a step that both make next."""
    step.prepare(*data())
    before, error = weights_of(step), "none"
    try:
        act(step, rank)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    step.discard()
    moved = [name for name, value in weights_of(step).items() if not torch.equal(value, before[name])]
    return error, moved, step(*batches_of(0, rank, 2))["forget_loss"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return what each of two ranks met, by engine and case."""
    made = {}

    def of(engine):
        if engine not in made:
            folder = tmp_path_factory.mktemp("guards")
            model().save_pretrained(folder / "model")

            def act(rank):
                own = {}
                for name, (base, stop, _) in cases(engine).items():
                    step = UnlearnStep(ENGINES[engine](folder), recipe(base), process_group=distributed.group.WORLD)
                    own[name] = attempted(step, stop, rank)
                return own

            made[engine] = found_on(2, folder, act)
        return made[engine]

    return of


@pytest.mark.parametrize(("engine", "name"), [(engine, name) for engine in ENGINES for name in cases(engine)])
def test_what_one_rank_cannot_do_neither_does(engine, name, found):
    errors, moved, losses = zip(*(each[name] for each in found(engine)), strict=True)
    for error, words in zip(errors, cases(engine)[name][2], strict=True):
        assert error.startswith(words)
    assert moved == ([], []) and losses[0] == losses[1]
