"""One rank of several command lines, one after the other; writes what each printed and returned.

torchrun --nproc-per-node 2 -m tests.support.command_line_child FOLDER
"""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from unittest import mock

from moe_unlearn import trace
from moe_unlearn.cli import main
from moe_unlearn.step import UnlearnStep
from tests.support.command_line import arguments

SIZES = ("--max-length", "48", "--batch-size", "4")


def unlearning(folder: Path, out: str, *more: str, steps: int = 4, options: tuple = ("--no-eval",)) -> list[str]:
    """Return the command of a run, whose four micro-batches of an epoch two ranks share without a rest."""
    chosen = [f"steps={steps}", "batch_size=3", "optimizer.lr=1e-3", "data.max_length=48", *more]
    return ["run", "npo", *arguments(folder), "--out", str(folder / out), *options, "--set", *chosen]


def measuring(folder: Path, verb: str, out: str, *more: str) -> list[str]:
    return [verb, *arguments(folder), *SIZES, *more, "--out", str(folder / out)]


def writing(folder: Path, out: str) -> list[str]:
    """Return the command by which the model writes alternates to questions, of which it makes a file."""
    asked, sizes = folder / f"{out}.asked.jsonl", ("--count=2", "--new-tokens=8", "--instruction=Another.")
    rows = [{"question": f"the number of agent {n}?", "answer": f"it is {n * 37}"} for n in range(3)]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = ["--model", str(folder / "model"), "--forget", str(asked)]
    return ["alternates", *given, *sizes, "--batch-size", "2", "--out", str(folder / out)]


def commands(folder: Path, rank: int) -> dict[str, list[str]]:
    """Return the commands by name; those of the two ranks differ where one of them is to fail."""
    holdout = ("--holdout", str(folder / "holdout.jsonl"))
    reference, before = ((option, str(folder / "model")) for option in ("--reference", "--before"))
    lost = folder / ("none.jsonl" if rank else "retain.jsonl")
    return {
        "run": unlearning(folder, "run"),
        "half": unlearning(folder, "resumed", steps=2),
        "resumed": unlearning(folder, "resumed", options=("--no-eval", "--resume")),
        "evaluated": unlearning(folder, "evaluated", steps=1, options=holdout),
        "plan": unlearning(folder, "plan", options=("--dry-run",)),
        "eval": measuring(folder, "eval", "eval.json", *holdout),
        "stats": measuring(folder, "stats", "stats.json"),
        "mask": measuring(folder, "mask", "mask.safetensors", "--keep", "0.3"),
        "help": ["run", "--help"],
        "unknown": ["run", "npo", "--wrong"],
        "refused": ["report", str(folder / "run")],
        "missing": ["stats", *arguments(folder, model="none")],
        "one": ["stats", *arguments(folder, retain=lost)],
        "fault": measuring(folder, "stats", "fault.json"),
        "pipe": measuring(folder, "stats", "pipe.json"),
        "verify": unlearning(folder, "verified", options=("--verify", "1", "--no-eval", "--mesh", "fsdp=2")),
        "parted": unlearning(folder, "parted", options=("--verify", "1", "--no-eval")),
        "again": measuring(folder, "stats", "again.json"),
        "fsdp": unlearning(folder, "fsdp", options=(*holdout, *reference, "--mesh", "fsdp=2", "--overwrite")),
        "experts": unlearning(folder, "experts", options=("--mesh", "fsdp=2,ep=2", "--delta")),
        "eval fsdp": measuring(folder, "eval", "eval-fsdp.json", *holdout, *before, "--mesh", "fsdp=2"),
        "stats fsdp": measuring(folder, "stats", "stats-fsdp.json", "--mesh", "fsdp=2"),
        "mask fsdp": measuring(folder, "mask", "mask-fsdp.safetensors", "--keep", "0.3", "--mesh", "fsdp=2"),
        "alternates fsdp": [*writing(folder, "alternates-fsdp.jsonl"), "--mesh", "fsdp=2"],
        "other ranks": unlearning(folder, "mesh", options=("--no-eval", "--mesh", "fsdp=3")),
        "relearn": measuring(folder, "eval", "none.json", "--relearn", "3", "--mesh", "fsdp=2"),
    }


def said(folder: Path, name: str, rank: int, command: list[str]) -> dict:
    """Run a command; return its code and what this process wrote to its descriptors meanwhile.

    Nobody reads what the first rank prints of the command "pipe".
    """
    paths = [folder / f"{name}-{rank}.{stream}" for stream in ("out", "err")]
    kept, streams = [os.dup(1), os.dup(2)], (sys.stdout, sys.stderr)
    try:
        for stream, path in zip((1, 2), paths, strict=True):
            with path.open("wb") as file:
                os.dup2(file.fileno(), stream)
        if name == "pipe":
            read, write = os.pipe()
            os.close(read)
            os.dup2(write, 1)
            os.close(write)
        # those of this process know whether the descriptors could seek before, or are pytest's own
        sys.stdout, sys.stderr = (open(stream, "w", encoding="utf-8", closefd=False) for stream in (1, 2))
        code = main(command)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams
        for stream, own in zip((1, 2), kept, strict=True):
            os.dup2(own, stream)
            os.close(own)
    out, err = (path.read_text(encoding="utf-8") for path in paths)
    return {"code": code, "out": out, "err": err}


def broken(*_: object) -> None:
    raise KeyError("a fault of the program")


def killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wrong(step: UnlearnStep) -> dict[str, float]:
    """Combine the gradients, and spoil one of them."""
    metrics = combine(step)
    next(g for _, p in step.view().trained if (g := step.gradients.of(p)) is not None).mul_(1.5)
    return metrics


combine = UnlearnStep.combine
# what the second rank meets instead of a function, by the name of a command or by $FAULT
FAULTS = {
    "fault": (trace, "routing_frequencies", broken),
    "parted": (UnlearnStep, "combine", wrong),
    "killed": (UnlearnStep, "combine", killed),
}


def run(folder: Path, only: str | None) -> None:
    rank, found = int(os.environ["RANK"]), {}
    for name, command in commands(folder, rank).items():
        if only in (name, None):
            fault = FAULTS.get(os.environ.get("FAULT", name)) if rank else None
            with mock.patch.object(*fault) if fault else contextlib.nullcontext():
                found[name] = said(folder, name, rank, command)
    (folder / f"rank{rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
