"""A rank that is lost in the middle of a step ends the others, with a message and before long."""

import os
import signal
import time

import pytest
import torch
from torch import distributed
from transformers.distributed import DistributedConfig

from moe_unlearn.step import UnlearnStep
from tests.support.forked_ranks import run_forked
from tests.support.models import tiny_olmoe
from tests.support.sharded_child import batches_of, shard
from tests.support.steps import VOCAB, data, recipe

pytestmark = pytest.mark.slow


def whole(folder):
    torch.manual_seed(0)
    return tiny_olmoe(VOCAB).eval()


def experts(folder):
    """The model of two ranks that have half of the experts each."""
    config = DistributedConfig(fsdp_size=2, ep_size=2)
    return tiny_olmoe(VOCAB).from_pretrained(folder / "model", distributed_config=config).eval()


ENGINES = {"whole weights": whole, "FSDP2": lambda folder: shard(whole(folder)), "experts": experts}


def in_forward(step, lose):
    step.model.model.layers[1].register_forward_pre_hook(lambda *_: lose())


def in_backward(step, lose):
    def watch(module, args, output):
        output.register_hook(lambda gradient: lose())

    step.model.model.layers[0].register_forward_hook(watch)


def before_update(step, lose):
    step.optimizer.register_step_pre_hook(lambda *_: lose())


def start(engine, folder):
    """The step of a rank, after its first update."""
    step = UnlearnStep(ENGINES[engine](folder), recipe("npo"), process_group=distributed.group.WORLD)
    step.prepare(*data())
    step(*batches_of(0, distributed.get_rank(), 2))
    return step


@pytest.mark.parametrize("where", [in_forward, in_backward, before_update])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_killed_rank_ends_the_other(engine, where, tmp_path):
    whole(tmp_path).save_pretrained(tmp_path / "model")

    def act(rank):
        step = start(engine, tmp_path)
        if rank:
            where(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
        # the second is for a rank that needs nobody until its own step has ended
        for i in (1, 2):
            step(*batches_of(i, rank, 2))

    began = time.monotonic()
    assert run_forked(2, tmp_path, act) == [1, -signal.SIGKILL]
    assert time.monotonic() - began < 50  # without waiting for the time-out of the group, a minute
    assert "gloo" in said(tmp_path, 0)


def test_a_rank_that_hangs_ends_the_other_when_the_group_has_waited_long_enough(tmp_path):
    def hang():
        while not (tmp_path / "error0").exists():
            time.sleep(0.1)

    def act(rank):
        step = start("FSDP2", tmp_path)
        if rank:
            in_backward(step, hang)
        step(*batches_of(1, rank, 2))

    assert run_forked(2, tmp_path, act, patience=6) == [1, 1]
    assert "Timed out waiting 6000ms" in said(tmp_path, 0)


def said(folder, rank):
    """The last line of what a rank raised."""
    return (folder / f"error{rank}").read_text(encoding="utf-8").splitlines()[-1]
