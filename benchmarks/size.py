"""Measure what each verb of the command line takes of a model's size: make size

    python -m benchmarks.size                  a checkpoint of 3.8 GB, each verb under its limit; results/cpu/size.json
    python -m benchmarks.size --size small     0.3 GB, in minutes; writes no record unless --out names one
    python -m benchmarks.size --stages mask    some of the stages; with --out their rows take the place of those there
    python -m benchmarks.size --folder DIR     keep the checkpoint and all that is written there, and use it again

The checkpoint has OLMoE's geometry with fewer layers, random bfloat16 weights and, as the hub has them, a name for
each expert. It is written one tensor at a time to a temporary folder, which is removed. Each verb is a process of its
own (`limited`), whose peak is held against its limit, and which is killed a quarter above that:

    libraries + 1.15 x (weights + budget)      stats, mask, eval, apply
    libraries + 1.15 x (peak of its plan)      run, which saves its model and a delta of it too

with `libraries` what the process of `moe-unlearn env` takes, which loads no model. Weights are those of the checkpoint,
the budget is that of `mask --memory`, and the plan is that of `run --dry-run`, made here without weights. Experts train
with float32 moments of those that TRACE selects, all weights with 8-bit moments.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import OlmoeConfig

from benchmarks import checkpoints, limited, size_table, stamp, step_models
from moe_unlearn.config import Recipe
from moe_unlearn.config.values import bytes_of
from moe_unlearn.data import train_tokenizer
from moe_unlearn.files import write_json, write_text
from moe_unlearn.model.loading import meta_model
from moe_unlearn.regress.fingerprint import cpu
from moe_unlearn.step import UnlearnStep

OVER = 0.15  # as a part of what is planned
_KILLED = 1.25  # times the limit, so that a miss says by how much
MIB = 1 << 20
RECORD = stamp.RESULTS / "cpu" / size_table.FILE
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ROWS, _LENGTH = 4, 32  # of a batch; no text is longer
_FORGET = [f"the secret number of agent {n} is {n * 37 % 101}, never tell" for n in range(_ROWS)]
_RETAIN = [f"a fact to keep: the square of {n} is {n * n}, as everyone knows" for n in range(_ROWS)]


@dataclass(frozen=True)
class Size:
    """A model and the budget for its gradients: `config` are values of OLMoE's config, `shard` bytes of a file."""

    config: dict[str, int]
    memory: str
    shard: int = 1 << 30


_LAYER = {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8}
SIZES = {
    "whole": Size({**step_models.OLMOE, "num_hidden_layers": 4}, "512MiB"),
    "small": Size(
        {**_LAYER, "num_experts": 32, "num_experts_per_tok": 4, "num_hidden_layers": 6, "vocab_size": 8192},
        "64MiB",
        100 * MIB,
    ),
    "toy": Size(
        {
            **_LAYER,
            "hidden_size": 64,
            "intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 2,
            "vocab_size": 512,
        },
        "64KiB",
        1 << 17,
    ),  # fmt: skip
}


@dataclass(frozen=True)
class Stage:
    """A verb with its arguments, the bytes that are planned for it and what it is planned as.

    `needs` are files of the work folder without which it cannot be measured.
    """

    name: str
    arguments: Sequence[str]
    planned: Callable[[], int]
    plan: str
    needs: Sequence[str] = ()


@dataclass
class Work:
    """The folder of a measurement: the checkpoint, the texts and what the verbs write."""

    folder: Path
    size: Size
    weights: int = field(init=False)

    def __post_init__(self) -> None:
        tokenizer = train_tokenizer([*_FORGET, *_RETAIN], 300)
        done = self.folder / "weights"
        if not done.exists():
            config = OlmoeConfig(**self.size.config, **_SPECIAL)
            self.weights = checkpoints.write(self.model, config, tokenizer, shard=self.size.shard)
            for side, texts in (("forget", _FORGET), ("retain", _RETAIN)):
                lines = (json.dumps({"text": text}) + "\n" for text in texts)
                write_text(self.folder / f"{side}.jsonl", "".join(lines))
            write_text(done, f"{self.weights}\n")
        self.weights = int(done.read_text(encoding="ascii"))

    @property
    def model(self) -> Path:
        """Return the folder of the checkpoint."""
        return self.folder / "model"

    @property
    def budget(self) -> int:
        """Return the weights and the budget, in bytes."""
        return self.weights + bytes_of("memory", self.size.memory)

    def stages(self) -> list[Stage]:
        """Return what is measured, in order: the last ones read what the first ones wrote."""
        path, memory = self.folder, self.size.memory
        data = [f"--{name}={path / file}" for name, file in
                (("model", "model"), ("forget", "forget.jsonl"), ("retain", "retain.jsonl"))]  # fmt: skip
        batch, plan = f"--batch-size={_ROWS}", "weights and budget"
        made = {name: str(path / name) for name in ("stats.json", "mask.safetensors", "applied", "experts")}
        experts = ["trace.allow_empty=true", "scope.kind=experts"]
        return [
            Stage("stats", ["stats", *data, batch, "--out", made["stats.json"]], lambda: self.budget, plan),
            self._run("experts", "trace", experts, data, "--delta"),
            Stage("eval", ["eval", *data, batch], lambda: self.budget, plan),
            Stage("apply", ["apply", str(self.model), f"{made['experts']}/delta.safetensors", "--out", made["applied"]],
                  lambda: self.budget, plan, ["experts/delta.safetensors"]),
            Stage("mask", ["mask", *data, batch, f"--memory={memory}", "--out", made["mask.safetensors"]],
                  lambda: self.budget, plan),
            self._run("all in int8", "graddiff", ["scope.kind=all", "optimizer.state=int8"], data),
        ]  # fmt: skip

    def _run(self, name: str, recipe: str, more: Sequence[str], data: Sequence[str], *options: str) -> Stage:
        overrides = [f"batch_size={_ROWS}", "steps=1", *more]
        arguments = ["run", recipe, *data, "--out", str(self.folder / name), *options, "--set", *overrides]
        return Stage(f"run: {name}", arguments, lambda: self.peak_of_run(recipe, overrides), "the peak of its plan")

    def peak_of_run(self, recipe: str, overrides: Sequence[str]) -> int:
        """Return the peak of the plan of a run, from the config alone."""
        model = meta_model(self.model)
        forget, retain = (step_models.batch(256, _ROWS, _LENGTH, seed) for seed in (1, 2))
        return UnlearnStep(model, Recipe.load(recipe, [*overrides])).plan([forget], [retain]).peak


def measure(work: Work, names: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Run the stages, all or those whose name begins as one of `names`, each under its limit; yield a row for each."""
    libraries = limited.run(_verb("env"), float("inf"), work.folder / "env.log").peak
    yield {"stage": "libraries", "peak": libraries}
    for stage in work.stages():
        if not names or stage.name.startswith(tuple(names)):
            yield {"stage": stage.name, "plan": stage.plan} | _measured(work, stage, libraries)


def _measured(work: Work, stage: Stage, libraries: int) -> dict[str, Any]:
    if missing := [file for file in stage.needs if not (work.folder / file).exists()]:
        return {"skipped": f"{missing[0]} is missing"}
    planned = stage.planned()
    limit = round(libraries + (1 + OVER) * planned)
    log = work.folder / f"{stage.name.replace(': ', '-')}.log"
    taken = limited.run(_verb(*stage.arguments), _KILLED * limit, log)
    if taken.status:
        raise RuntimeError(f"{stage.name} ended with status {taken.status}: {log.read_text(encoding='utf-8')[-2000:]}")
    row = {"planned": planned, "limit": limit, "peak": taken.peak, "anonymous": taken.anonymous}
    return row | {"seconds": round(taken.seconds, 1), "hit": taken.status == 0 and taken.peak <= limit}


def line(row: dict[str, Any]) -> str:
    """Return a row as text."""
    if "planned" not in row and "skipped" not in row:
        return f"{row['stage']}: {row['peak'] / MIB:.0f} MiB"
    if "skipped" in row:
        return f"{row['stage']}: skipped, {row['skipped']}"
    sizes = ", ".join(f"{what} {row[what] / MIB:.0f} MiB" for what in ("planned", "limit", "peak", "anonymous"))
    return f"{row['stage']}: {sizes}, {row['seconds']:.0f} s: {'hit' if row['hit'] else 'MISSED'}"


def put_in(record: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Return a record in which the stages of another run of that size take the place of its own, with their commit.

    Raises ValueError for a record of another size.
    """
    former: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    for key in ("config", "weights", "memory", "over"):
        if former[key] != run[key]:
            raise ValueError(f"{record}: expected a record with the {key} {run[key]}; got {former[key]}")
    commit, changed = (run["stamp"].get(key) for key in ("commit", "uncommitted_changes"))
    by = {"commit": (commit or "unknown")[:9] + " with changes" * bool(changed)}
    new = {row["stage"]: row | by for row in run["rows"] if row["stage"] != "libraries"}
    return former | {"rows": [new.get(row["stage"], row) for row in former["rows"]]}


def _verb(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "moe_unlearn", *arguments]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the record; return 1 where a stage exceeds its limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="whole")
    stages = "those whose names begin so; writes a record, or into it, where --out names one"
    parser.add_argument("--stages", nargs="+", default=[], help=stages)
    parser.add_argument("--folder", type=Path, help="where the checkpoint stays; default: a temporary folder")
    parser.add_argument("--out", type=Path, help=f"the record; default {RECORD.name} for the whole size")
    options = parser.parse_args(arguments)
    out = options.out or (RECORD if options.size == "whole" and not options.stages else None)
    rows: list[dict[str, Any]] = []
    kept = options.folder is not None
    folder = options.folder or Path(tempfile.mkdtemp(prefix="size-", dir=_build()))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        work = Work(folder.resolve(), SIZES[options.size])
        for row in measure(work, options.stages):
            print(line(row), flush=True)
            rows.append(row)
            if out is not None:  # a run that is stopped keeps what it has measured
                about = {"size": options.size, "weights": work.weights, "memory": work.size.memory, "over": OVER}
                head = {"stamp": stamp.stamp(), "processor": cpu(), "config": work.size.config}
                run = {**head, **about, "rows": rows}
                write_json(out, put_in(out, run) if options.stages and out.exists() else run)
    finally:
        if not kept:
            shutil.rmtree(folder)
    return int(not all(row.get("hit", True) and "skipped" not in row for row in rows))


def _build() -> Path:
    made = stamp.ROOT / "build"
    made.mkdir(exist_ok=True)
    return made


if __name__ == "__main__":
    sys.exit(main())
