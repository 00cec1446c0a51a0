"""What several GPUs alone can prove of ranks that share weights out: `make gpu-ranks`, on one machine, some 3 minutes.

    python -m tests.gpu_ranks --out DIR                                    one rank a GPU, over NCCL
    python -m tests.gpu_ranks --out DIR --device cpu                       the rehearsal: two ranks, over gloo

    order      steps with collectives in the backward pass, on ranks with tokens of their own number: no rank hangs, all
               end with the same weights, and with those of one device that has the ranks' batches as micro-batches
    memory     the peak of a rank's step is at most what the plan says, and a tenth
    overlap    which part of the time of collectives other kernels run in; recorded, on GPUs alone
    lost       a rank is killed in the backward pass: the others end by themselves within the group's time-out

It needs torch >= 2.13, transformers >= 5.19 and two GPUs, and says so where they lack. Each result is a line of
DIR/ranks.journal. Exit status: 0 all passed, 1 something failed, 2 not run here, with the reason on stderr.
"""

import argparse
import datetime
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile
from transformers.distributed import DistributedConfig

from benchmarks.journal import Journal, of_kind, read
from moe_unlearn.cli.launch import end
from moe_unlearn.model.states import decoder_layers
from moe_unlearn.plan.memory import measured_peak
from moe_unlearn.sharding import check_versions, whole
from moe_unlearn.step import UnlearnStep
from tests.support.batches import random_batch
from tests.support.models import TINY_MODELS
from tests.support.steps import made_of, recipe

ROOT = Path(__file__).resolve().parent.parent
JOURNAL = "ranks.journal"  # no run of `gpu_run`, whose tables are of one device
VOCAB, STEPS, PATIENCE = 512, 4, 60.0
# width, layers and experts, by device
SIZES = {"cuda": (1024, 6, 32), "cpu": (128, 3, 8)}
ENGINES = ("FSDP2", "experts", "whole weights")
CASES = {"trace": (), "combined": ("mollm.kl_floor=0", "mollm.gradients=compact")}
# sums in another order put other weights next to the threshold of a mask, which then move or do not: two ranks over
# gloo end 3e-2 of the change apart in float32, and 2e-15 in float64, which this check does not take
COMPARED = [(case, engine) for case in CASES for engine in ENGINES if (case, engine) != ("combined", "experts")]
# sums in another order, against the change that a run makes to all weights
ROUNDING = 1e-3


def model(device: str) -> nn.Module:
    width, layers, experts = SIZES[device]
    torch.manual_seed(0)
    return TINY_MODELS["olmoe"](VOCAB, hidden_size=width, num_hidden_layers=layers, num_experts=experts).eval()


def shared(engine: str, device: str, folder: Path) -> nn.Module:
    """The model as an engine shares it out over all ranks."""
    count = distributed.get_world_size()
    if engine == "experts":
        config = DistributedConfig(fsdp_size=count, ep_size=count)
        return type(model(device)).from_pretrained(folder / "model", distributed_config=config).eval()
    made = model(device).to(device)
    if engine == "FSDP2":
        for layer in decoder_layers(made):
            fully_shard(layer)
        fully_shard(made)
    return made


def sides(device: str, ranks: int) -> list[list[dict]]:
    """The forget and the retain batches of all steps and ranks; each rank has tokens of its own number."""
    made = []
    for side in (1, 2):
        batches = [random_batch(VOCAB, 1 + i % 3, 48, seed=100 * side + i) for i in range(STEPS * ranks)]
        made.append([{key: value.to(device) for key, value in batch.items()} for batch in batches])
    return made


def stepped(made: nn.Module, case: str, device: str, mine: Sequence[int], ranks: int) -> UnlearnStep:
    """The step after steps in which this process has the batches of the ranks `mine`."""
    settings = recipe(case, "optimizer.name=adamw", "optimizer.eps=1e-4", *CASES[case], lr=1e-3)
    group = distributed.group.WORLD if len(mine) < ranks else None
    step, (forget, retain) = UnlearnStep(made, settings, process_group=group), sides(device, ranks)
    step.prepare(forget, retain)
    for i in range(STEPS):
        made_of(step, [(forget[ranks * i + rank], retain[ranks * i + rank]) for rank in mine])
    return step


def order(device: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Yield what was checked, and what is wrong with it, empty if nothing is."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    for case in CASES:
        start = {name: p.detach() for name, p in model(device).to(device).named_parameters()}
        alone = dict(stepped(model(device).to(device), case, device, range(ranks), ranks).model.named_parameters())
        moved = torch.stack([(alone[name] - p).norm() for name, p in start.items()]).norm()
        for engine in (engine for of, engine in COMPARED if of == case):
            step = stepped(shared(engine, device, folder), case, device, [rank], ranks)
            ours = {name: whole(p.detach()) for name, p in step.model.named_parameters()}
            apart = torch.stack([(ours[name] - p).norm() for name, p in alone.items()]).norm() / moved
            first = {name: value.clone() for name, value in ours.items()}
            for value in first.values():
                distributed.broadcast(value, 0)
            other = [name for name, value in ours.items() if not torch.equal(value, first[name])]
            wrong = f"rank {rank} has other weights than rank 0: {other[0]}" if other else ""
            if not wrong and not float(apart) <= ROUNDING:
                wrong = f"{float(apart):.2e} of the change apart from one device"
            step.close()
            yield f"order: {case}, {engine}, {float(apart):.1e} apart", wrong


def memory(device: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Compare the peak of a step, over what a rank has at rest, with the plan's."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    for engine, mesh in (("FSDP2", f"fsdp={ranks}"), ("experts", f"fsdp={ranks},ep={ranks}")):
        pair = [[side[0]] for side in sides(device, ranks)]
        plan = UnlearnStep(model(device).to(device), recipe("graddiff")).plan(*pair, mesh=mesh)
        planned = plan.peak - plan.memory["weights"] - plan.memory["optimizer state"]
        step = UnlearnStep(shared(engine, device, folder), recipe("graddiff"))
        batches, peaks = [side[0] for side in pair], []
        step(*batches)
        for _ in range(3):
            with measured_peak(device) as measured:
                step(*batches)
            peaks.append(measured.peak)
        step.close()
        said = f"{min(peaks) / 2**20:.1f} MiB of {planned / 2**20:.1f} planned"
        yield f"memory: {engine}, rank {rank}, {said}", "" if min(peaks) <= 1.1 * planned else said


def overlap(spans: Sequence[tuple[float, float, bool]]) -> float:
    """Return which part of the time of collectives other kernels run in, from (start, end, whether a collective)."""
    # sweep over all starts and ends; at one moment ends come before starts
    marks = sorted((at, opens, collective) for start, end, collective in spans for at, opens in ((start, 1), (end, 0)))
    running, before, total, covered = {True: 0, False: 0}, 0.0, 0.0, 0.0
    for at, opens, collective in marks:
        if running[True]:
            total += at - before
            covered += (at - before) * bool(running[False])
        running[collective] += 1 if opens else -1
        before = at
    return covered / total if total else 0.0


def overlapped(device: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Record how far collectives of FSDP2 and of the sink run beside kernels."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    batches = [side[0] for side in sides(device, ranks)]
    step = UnlearnStep(shared("FSDP2", device, folder), recipe("graddiff"))
    step(*batches)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step(*batches)
        torch.cuda.synchronize()
    events = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = [(e.time_range.start, e.time_range.end, "nccl" in e.name.lower()) for e in events]
    step.close()
    yield f"overlap: rank {rank}, {overlap(spans):.0%} of the time of collectives", "" if spans else "no kernels seen"


def killed(device: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Kill the last rank in a backward pass; the others are to end by themselves, by an error or by NCCL's watchdog."""
    step, rank = UnlearnStep(shared("FSDP2", device, folder), recipe("graddiff")), distributed.get_rank()
    batches = [side[0] for side in sides(device, distributed.get_world_size())]
    step(*batches)
    if rank == distributed.get_world_size() - 1:
        decoder_layers(step.model)[0].register_forward_hook(
            lambda module, args, output: output.register_hook(lambda g: os.kill(os.getpid(), signal.SIGKILL)) and None
        )
    for _ in range(2):
        step(*batches)
    yield f"lost: rank {rank} did not notice", "the killed rank was not missed"


CHECKS: dict[str, Callable[[str, Path], Iterator[tuple[str, str]]]] = {
    "order": order,
    "memory": memory,
    "overlap": overlapped,
    "lost": killed,
}


def rank_of(check: str, device: str, folder: Path) -> None:
    """Be one of the ranks of a check, as the environment says, and write what it finds."""
    rank, journal = int(os.environ["RANK"]), Journal(folder / JOURNAL, check)
    if device == "cuda":
        torch.cuda.set_device(rank)
    patience = datetime.timedelta(seconds=PATIENCE)
    distributed.init_process_group("nccl" if device == "cuda" else "gloo", timeout=patience)
    for name, wrong in CHECKS[check](device, folder):
        journal.write("test", name=name, outcome="failed" if wrong else "passed", seconds=0.0, why=wrong)
    distributed.destroy_process_group()


def conduct(check: str, device: str, ranks: int, folder: Path) -> str:
    """Start the ranks of a check; return what went wrong, empty if nothing did."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    size = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost"}
    common = os.environ | size | {"MASTER_PORT": str(port), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if device == "cpu":
        common["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "tests.gpu_ranks", "--rank-of", check, "--device", device, "--out", str(folder)]
    children = [
        subprocess.Popen(command, cwd=ROOT, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]
    try:
        ended = [child.wait(timeout=4 * PATIENCE) for child in children]
    except subprocess.TimeoutExpired:
        return f"ranks hang: none of them ended within {4 * PATIENCE:.0f} s of the one before"
    finally:
        for child in children:
            child.kill()
    if check == "lost":
        *others, last = ended
        good = last == -signal.SIGKILL and all(code not in (0, last) for code in others)
    else:
        good = not any(ended)
    return "" if good else f"ranks ended with {ended}"


def reason(device: str) -> str:
    """Return why nothing is run here; empty if something is."""
    try:
        check_versions()
    except ValueError as error:
        return str(error)
    there = torch.cuda.device_count()
    return f"ranks need two GPUs; this machine has {there}" if device == "cuda" and there < 2 else ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder of ranks.journal")
    parser.add_argument("--device", choices=tuple(SIZES), default="cuda")
    parser.add_argument("--only", default="", help="the checks to run, with commas")
    parser.add_argument("--rank-of", choices=tuple(CHECKS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rank_of:
        rank_of(options.rank_of, options.device, options.out)
        return 0
    if why := reason(options.device):
        print(f"not run: {why}", file=sys.stderr)
        return 2
    wanted = options.only.split(",") if options.only else [*CHECKS]
    if unknown := set(wanted) - CHECKS.keys():
        parser.error(f"--only: there is no check {', '.join(sorted(unknown))}")
    ranks, folder = max(torch.cuda.device_count() if options.device == "cuda" else 2, 2), options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model(options.device).save_pretrained(folder / "model")
    path = folder / JOURNAL
    path.unlink(missing_ok=True)
    for check in wanted:
        if check == "overlap" and options.device == "cpu":
            continue  # kernels of a CPU have no streams
        began = time.monotonic()
        wrong = conduct(check, options.device, ranks, folder)
        outcome = "failed" if wrong else "passed"
        seconds = round(time.monotonic() - began, 1)
        Journal(path, check).write("test", name=check, outcome=outcome, seconds=seconds, why=wrong)
    found = of_kind(read(path), "test")
    for line in found:
        print(line["outcome"], line["name"], line["why"])
    return int(any(line["outcome"] != "passed" for line in found))


if __name__ == "__main__":
    end(main())
