"""make soak: steps of two ranks, verified and killed, on every engine; the result is recorded.

    python -m tests.soak_ranks [--minutes M] [--steps 20] [--only NAME] [--out benchmarks/results/soak_ranks.json]

Each case is made twice. Once every step is verified against the plain step of one process (`verify`). Once the second
rank is killed in a backward pass, in a drawn step of each third of the way, and both ranks begin again from the newest
checkpoint. Both ways must end with the same bits. Cases come in a drawn, fixed order, so that a short soak is a fair
sample; the record says how many there are. The exit code is 1 if a case failed.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from transformers.distributed import DistributedConfig

from benchmarks.stamp import RESULTS, stamp
from moe_unlearn.checkpoint import sharded
from moe_unlearn.files import write_text
from moe_unlearn.model.states import decoder_layers
from moe_unlearn.step import UnlearnStep, saved
from tests.support.forked_ranks import run_forked
from tests.support.sharded_child import ALL, batches_of, model, recipe_of, shard, weights_of
from tests.support.steps import data, made_of

EVERY = 3  # steps between checkpoints
KILLS = 3
ENGINES = ("FSDP2", "experts", "whole weights")
# what an engine refuses, and what cannot be verified: the plain path has no other way
LEFT_OUT = {("experts", "lora"), *((engine, "npo plain") for engine in ENGINES)}


def made(engine: str, name: str, folder: Path) -> nn.Module:
    """The model of a case as an engine shares it out."""
    if engine == "experts":
        config = DistributedConfig(fsdp_size=2, ep_size=2)
        whole = model(name)
        found = type(whole).from_pretrained(folder / "model", distributed_config=config)
        return found.train(whole.training)
    return shard(model(name)) if engine == "FSDP2" else model(name)


def dies(step: UnlearnStep) -> None:
    """Have the next backward pass of this rank be its last."""

    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        output.register_hook(lambda g: os.kill(os.getpid(), signal.SIGKILL))

    decoder_layers(step.model)[0].register_forward_hook(hook)


def advance(rank: int, engine: str, name: str, folder: Path, steps: int, killed: int | None, *, verify: bool) -> None:
    """Go on from the newest checkpoint, if there is one; the second rank dies in the step `killed`."""
    options = {"verify": verify, "process_group": distributed.group.WORLD}
    step = UnlearnStep(made(engine, name, folder.parent), recipe_of(name), **options)
    root = folder / "checkpoints"
    newest = sharded.latest(root)
    if newest is None:
        step.prepare(*data())
    else:
        state = sharded.load(newest, states=["step"])["step"]
        step.load_state_dict(state)
        saved.load_weights(step, newest)
        saved.load_optimizer(step, newest, state)
    for i in range(step.steps, steps):
        if rank == 1 and i == killed:
            dies(step)
        made_of(step, [batches_of(i, rank, 2)])
        if (i + 1) % EVERY == 0:
            sharded.commit(root, i + 1, saved.tree_of(step))
    after = weights_of(step)
    if rank == 0:
        save_file(after, folder / "after.safetensors")


def attempt(engine: str, name: str, folder: Path, steps: int, killed: int | None, *, verify: bool) -> None:
    """Run two ranks to their end; AssertionError, which says how they ended, if that is not the one expected."""
    with tempfile.TemporaryDirectory() as meet:
        ended = run_forked(
            2, Path(meet), lambda rank: advance(rank, engine, name, folder, steps, killed, verify=verify), patience=20
        )
        errors = [path.read_text(encoding="utf-8")[-1000:] for path in sorted(Path(meet).glob("error*"))]
    assert ended == [0, 0] if killed is None else ended[1] == -signal.SIGKILL and ended[0] == 1, (ended, errors)


def run(engine: str, name: str, steps: int) -> dict:
    """Return what became of one case."""
    started, found = time.monotonic(), {"case": f"{engine}, {name}"}
    draw = random.Random(found["case"])
    try:
        with tempfile.TemporaryDirectory() as root:
            model(name).save_pretrained(Path(root) / "model")
            folders = [Path(root) / way for way in ("verified", "killed")]
            for folder in folders:
                folder.mkdir()
            attempt(engine, name, folders[0], steps, None, verify=True)
            thirds = [(k * steps // KILLS, (k + 1) * steps // KILLS) for k in range(KILLS)]
            for killed in [draw.randrange(*third) for third in thirds]:
                attempt(engine, name, folders[1], steps, killed, verify=False)
            attempt(engine, name, folders[1], steps, None, verify=False)
            ours, theirs = (load_file(folder / "after.safetensors") for folder in folders)
            start = {key: p.detach() for key, p in model(name).named_parameters()}
            assert any(not torch.equal(theirs[key], value) for key, value in start.items()), "no weight has moved"
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs), "the bits of an uninterrupted run"
        found["outcome"] = "passed"
    except AssertionError as error:
        found |= {"outcome": "failed", "why": str(error)}
    return found | {"seconds": round(time.monotonic() - started, 1)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no case after this long")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--out", type=Path, default=RESULTS / "soak_ranks.json")
    options = parser.parse_args(arguments)
    cases = [(engine, name) for engine in ENGINES for name in ALL if (engine, name) not in LEFT_OUT]
    random.Random(0).shuffle(cases)
    chosen, done = [case for case in cases if options.only in ", ".join(case)], []
    began = time.monotonic()
    for engine, name in chosen:
        if time.monotonic() - began > 60 * options.minutes:
            break
        done.append(run(engine, name, options.steps))
        print(f"{len(done)}/{len(chosen)} {json.dumps(done[-1])}", flush=True)
        record = {"stamp": stamp(), "steps": options.steps, "kills": KILLS, "cases": len(cases), "results": done}
        write_text(options.out, json.dumps(record, indent=1) + "\n")
    return int(any(entry["outcome"] != "passed" for entry in done))


if __name__ == "__main__":
    sys.exit(main())
