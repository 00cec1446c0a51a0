"""The options of each verb, apart from the verbs, so that --help loads neither torch nor transformers."""

import argparse
from typing import Any

from moe_unlearn.cli.arguments import (
    DTYPES,
    MODEL,
    SIDES,
    SOURCE,
    add_batch_size,
    add_chat,
    add_data,
    add_dry_run,
    add_loading,
    add_mesh,
    add_model,
    add_packing,
    add_progress,
    positive,
    steps,
)
from moe_unlearn.config import models, shipped

# what the verbs take, named here because the modules that have it load torch; tests/test_cli_help.py holds them to it
MASK_FORMATS = ("native", "official")
BENCHMARKS = ("muse", "tofu", "wmdp", "rwku", "completions")
LIKE = ("open-unlearning", "muse_bench")
ATTACKS = ("plain", "rounding", "relearning", "routing", "interpolation", "prompts", "inside")
RELEARN_STEPS, RELEARN_LR = 20, 1e-4  # of an audit
SHELLS = ("bash", "zsh", "fish")
GPUS = ("a100", "h100", "h200", "b200")
DELTA = "delta.safetensors"  # the name in the folder of a run
INSTRUCTION = (
    "Give another answer to the last question: as plausible as this one, as long and in the same style, but with other "
    "facts throughout. Write the answer alone."
)
_DELTA_FILE = "the file that `delta` or `run --delta` wrote"
_MODEL_OUT = "the folder to write; a model that is there is replaced"
_BEFORE = "folder of the model before unlearning"


def env(sub: argparse.ArgumentParser) -> None:
    """Add the options of `env`."""
    _add_json(sub, "what is found")


def recipes(sub: argparse.ArgumentParser) -> None:
    """Add the options of `recipes`."""
    _add_json(sub, "names and descriptions")


def show(sub: argparse.ArgumentParser) -> None:
    """Add the options of `show`."""
    _add_recipe(sub)
    sub.add_argument(
        "--model", choices=models(), metavar="NAME", help=f"take the recipe's values for one of: {', '.join(models())}"
    )
    _add_json(sub, "the rows")


def schema(sub: argparse.ArgumentParser) -> None:
    """Add the options of `schema`, which has none."""


def completion(sub: argparse.ArgumentParser) -> None:
    """Add the options of `completion`."""
    sub.add_argument("shell", choices=SHELLS, help="the shell that reads what is printed")


def stats(sub: argparse.ArgumentParser) -> None:
    """Add the options of `stats`."""
    add_data(sub)
    add_packing(sub)
    sub.add_argument("--per-layer", type=positive, default=2, help="experts that TRACE selects in a layer, at most")
    sub.add_argument(
        "--min-ratio", type=float, default=1.5, help="least forget frequency of a selected one, over its retain one"
    )
    add_mesh(sub)
    add_dry_run(sub)
    sub.add_argument("--out", help="the JSON file to which the frequencies are written")
    add_progress(sub)


def mask(sub: argparse.ArgumentParser) -> None:
    """Add the options of `mask`."""
    add_data(sub)
    add_packing(sub)
    sub.add_argument("--keep", type=float, default=0.8, help="fraction of the weights that may move (default 0.8)")
    sub.add_argument("--gamma", type=float, default=1.0, help="the Hessian's scale in the score (default 1)")
    sub.add_argument("--official", action="store_true", help="reproduce the official code's masks")
    sub.add_argument(
        "--accumulation", type=positive, default=1, help="with --official: its micro-batches a step (it has 4)"
    )
    sub.add_argument(
        "--memory",
        metavar="BYTES",
        help="what gradients and scores may take beside the weights, such as 512MiB; default: most of what is free",
    )
    sub.add_argument(
        "--format",
        choices=MASK_FORMATS,
        default="native",
        help="native: safetensors, a bit for each weight; official: the WAGLE code's {name: bool tensor}, expert by "
        "expert",
    )
    add_mesh(sub)
    add_dry_run(sub)
    sub.add_argument("--out", required=True, help="the file to write; wagle.mask of a recipe reads both formats")
    sub.add_argument("--compare", metavar="MASK", help="count the weights in which the mask differs from this file's")
    add_progress(sub)


def alternates(sub: argparse.ArgumentParser) -> None:
    """Add the options of `alternates`."""
    add_model(sub)
    sub.add_argument("--forget", required=True, metavar="SOURCE", help=f"{SIDES['forget']}: {SOURCE}")
    add_chat(sub)
    sub.add_argument("--count", type=positive, default=5, help="alternates for each question (default 5)")
    sub.add_argument("--new-tokens", type=positive, default=200, help="the most tokens of an alternate (default 200)")
    sub.add_argument("--temperature", type=float, default=1.0, help="temperature of the samples (default 1)")
    sub.add_argument("--seed", type=int, default=0, help="what decides the samples (default 0)")
    sub.add_argument("--instruction", default=INSTRUCTION, help="what the model is told behind question and answer")
    add_batch_size(sub)
    add_mesh(sub)
    sub.add_argument("--out", required=True, help="the .jsonl file to write, which is the --forget of `run altpo`")
    add_progress(sub)


def run(sub: argparse.ArgumentParser) -> None:
    """Add the options of `run`."""
    sub.epilog = (
        "Started by torchrun, N processes share the rows: batch_size is that of each, so that a step takes N x "
        "batch_size x accumulate forget rows, and its weights are those of one process with N x accumulate."
    )
    _add_recipe(sub)
    sub.add_argument("--model", help=f"the model to unlearn (data.model): {MODEL}")
    sub.add_argument(
        "--adapter",
        metavar="r=N,targets=attention",
        help="train LoRA adapters alone: the keys of the recipe's section adapter, r, alpha, targets, dropout and "
        "bits (8 or 4: the frozen weights are rounded when they are loaded)",
    )
    sub.add_argument("--merge", action="store_true", help="save whole weights with the adapter added to them")
    add_loading(sub)
    sub.add_argument(
        "--model-config",
        metavar="NAME",
        help=f"take the recipe's values for one of: "
        f"{', '.join(models())}; with --dry-run and without --model plan for it, or for the folder or "
        "config.json given, without weights and data",
    )
    for side, what in SIDES.items():
        sub.add_argument(f"--{side}", metavar="SOURCE", help=f"{what} (data.{side}): {SOURCE}")
    sub.add_argument(
        "--retain-eval",
        metavar="SHARE|SOURCE",
        help="measure utility on rows that training does not see, a share of the retain documents (default 0.1; 0: "
        "none) or a source of their own (data.retain_eval)",
    )
    sub.add_argument(
        "--unseen",
        metavar="SOURCE",
        help=f"documents that the model never saw, to whose level `level` goes (data.unseen): {SOURCE}",
    )
    sub.add_argument(
        "--earlier",
        nargs="+",
        metavar="SOURCE",
        help="documents that earlier requests forgot, which stay as they are (data.earlier)",
    )
    sub.add_argument("--reference", help="folder of a retrained model, for PrivLeak (data.reference)")
    sub.add_argument("--out", help="folder of the run; default: a new one, runs/DATE-NAME-1 or the next number")
    sub.add_argument(
        "--cache", help="folder of examples and reference values that runs share; default: OUT/cache for the references"
    )
    add_dry_run(sub)
    add_mesh(sub, "; with --dry-run: plan it")
    sub.add_argument(
        "--fits",
        type=float,
        nargs="+",
        metavar="GIB",
        help="with --dry-run: ask whether devices of these sizes do, and what to change if not (default without a "
        "model: 80 141)",
    )
    sub.add_argument(
        "--verify",
        type=steps,
        nargs="?",
        const=True,
        default=0,
        metavar="N",
        help="make the first N steps (without N all) beside the plain path and compare",
    )
    used = sub.add_mutually_exclusive_group()
    used.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint in --out")
    used.add_argument("--overwrite", action="store_true", help="remove what a run has made in --out, and begin anew")
    sub.add_argument("--no-samples", action="store_true", help="keep texts of the documents out of the report")
    sub.add_argument("--no-eval", action="store_true", help="skip the metrics before and after")
    sub.add_argument("--delta", action="store_true", help=f"also write what changed since --model, as OUT/{DELTA}")
    sub.add_argument(
        "--log-every",
        type=steps,
        default=10,
        metavar="N",
        help="a line about every so many steps; 0: none (default 10)",
    )
    sub.add_argument(
        "--json-lines", action="store_true", help="print these lines to stdout as JSON, all that is logged"
    )
    add_progress(sub)


def warmup(sub: argparse.ArgumentParser) -> None:
    """Add the options of `warmup`."""
    sub.add_argument("model", metavar="MODEL", help=f"of which the config is read: {MODEL}, or {', '.join(models())}")
    _add_recipe(sub, default="graddiff")
    sub.add_argument("--dtype", choices=DTYPES, default="auto", help="the weights' (default: that of the config)")
    lengths = "of a batch's rows (default: data.max_length, a quarter of it, and so on down to 16)"
    sub.add_argument("--lengths", type=positive, nargs="+", default=[], metavar="TOKENS", help=lengths)
    sub.add_argument("--gpu", choices=GPUS, help="which GPU to compile for (default: the one that is here)")
    sub.add_argument("--cache", help="folder of the kernels, which may go to another machine (default: Triton's own)")
    sub.add_argument("--jobs", type=positive, help="how many kernels are compiled at a time (default: one a processor)")


def sweep(sub: argparse.ArgumentParser) -> None:
    """Add the options of `sweep`."""
    sub.add_argument("recipe", help="a YAML file or the name of a shipped recipe, as for run")
    sub.add_argument(
        "--grid",
        nargs="+",
        action="extend",
        required=True,
        metavar="KEY=VALUE,VALUE",
        help="keys of the recipe with their values: every combination is run; forget=npo,simnpo is forget.objective",
    )
    sub.add_argument(
        "--seeds", type=positive, default=1, help="how many seeds each combination has, from the recipe's on"
    )
    sub.add_argument("--set", nargs="+", action="extend", default=[], metavar="a.b=c", help="override keys in all runs")
    for name in ("model", "model-config", "adapter", *SIDES, "retain-eval", "unseen", "reference"):
        sub.add_argument(f"--{name}", help="as for run")
    sub.add_argument("--earlier", nargs="+", metavar="SOURCE", help="as for run")
    sub.add_argument("--merge", action="store_true", help="as for run")
    sub.add_argument("--no-samples", action="store_true", help="keep texts of the documents out of the reports")
    add_loading(sub)
    sub.add_argument("--no-eval", action="store_true", help="skip the metrics before and after each run")
    sub.add_argument("--cache", help="folder that the runs share for examples and reference values; default: OUT/cache")
    sub.add_argument("--jobs", type=positive, default=1, help="how many runs are made at a time, each a process")
    sub.add_argument("--csv", action="store_true", help="also write sweep.csv, every number of every run")
    sub.add_argument("--latex", action="store_true", help="also write sweep.tex, the table for LaTeX (booktabs)")
    sub.add_argument("--out", required=True, help="folder of the sweep; the same command goes on where it was stopped")


def evaluate(sub: argparse.ArgumentParser) -> None:
    """Add the options of `eval`."""
    add_data(sub, required=())
    sub.add_argument(
        "--reference",
        help="folder of the retrained model, for PrivLeak; with --benchmark muse or tofu a model for the reference "
        "attack",
    )
    sub.add_argument("--before", help=f"{_BEFORE}: how far routing moved, gibberish")
    sub.add_argument(
        "--relearn",
        type=steps,
        default=0,
        metavar="STEPS",
        help="attack: fine-tune a copy on the forget set for so many steps",
    )
    sub.add_argument("--relearn-lr", type=float, default=1e-4, help="learning rate of the attack (default 1e-4)")
    sub.add_argument("--benchmark", choices=BENCHMARKS, help="evaluate its sets, given by --data")
    sub.add_argument(
        "--data",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=SOURCE",
        help="the benchmark's sets, e.g. forget_qa=qa.json; wmdp: wmdp_bio=bio.jsonl; "
        "completions: names of your own, utility=wikitext.txt for perplexity alone",
    )
    sub.add_argument(
        "--reference-run",
        help="folder of the retrained model's evaluation by the same --benchmark, for privleak and forget_quality",
    )
    sub.add_argument("--gradient-norm", action="store_true", help="muse, tofu: the attack by gradient norms too")
    sub.add_argument(
        "--classifier",
        help="folder of a sequence classifier (Toxic-BERT) that judges completions; it is in memory beside the model",
    )
    sub.add_argument("--label", help="the classifier's label whose probability is reported, e.g. toxic")
    sub.add_argument(
        "--like", choices=LIKE, help="compute muse or tofu as that project does: to compare with its numbers"
    )
    add_mesh(sub)
    add_dry_run(sub)
    sub.add_argument("--out", help="write the metrics as JSON: a file; with --benchmark a folder")
    sub.add_argument("--redact", action="store_true", help="with --benchmark: leave texts out of what is written")
    add_progress(sub)


def audit(sub: argparse.ArgumentParser) -> None:
    """Add the options of `audit`."""
    add_data(sub, required=("forget", "retain", "holdout"))
    sub.add_argument("--before", required=True, help=_BEFORE)
    sub.add_argument(
        "--reference", help="the folder of a model retrained without the forget set: the null of every attack"
    )
    sub.add_argument("--out", required=True, help="folder of the report, and of what the audit needs to go on")
    sub.add_argument(
        "--attacks", metavar="A,B", help=f"of {', '.join(ATTACKS)}: those to make beside the first (default: all)"
    )
    sub.add_argument(
        "--budget", type=float, metavar="MINUTES", help="begin no attack after so long; the others are not tested"
    )
    sub.add_argument(
        "--relearn-steps",
        type=positive,
        default=RELEARN_STEPS,
        help=f"steps of the attacks by fine-tuning (default {RELEARN_STEPS})",
    )
    sub.add_argument("--relearn-lr", type=float, default=RELEARN_LR, help=f"their step size (default {RELEARN_LR:g})")
    sub.add_argument("--seed", type=int, default=0, help="what decides samples and batches (default 0)")
    add_progress(sub)


def delta(sub: argparse.ArgumentParser) -> None:
    """Add the options of `delta`."""
    sub.add_argument("base", metavar="BASE", help=f"the model as it was: {MODEL}")
    sub.add_argument("changed", metavar="MODEL", help="the changed model, of the same tensors")
    sub.add_argument("--recipe", help="a recipe whose SHA-256 the delta carries, such as RUN/recipe.yaml")
    sub.add_argument("--out", required=True, help="the safetensors file to write")


def apply(sub: argparse.ArgumentParser) -> None:
    """Add the options of `apply`."""
    sub.add_argument("base", metavar="BASE", help=f"the model that the delta was made from: {MODEL}")
    sub.add_argument("delta", metavar="DELTA", help=_DELTA_FILE)
    sub.add_argument("--out", required=True, help=_MODEL_OUT)


def revert(sub: argparse.ArgumentParser) -> None:
    """Add the options of `revert`."""
    sub.add_argument("changed", metavar="MODEL", help=f"the model that the delta led to: {MODEL}")
    sub.add_argument("delta", metavar="DELTA", help=_DELTA_FILE)
    sub.add_argument("--out", required=True, help=_MODEL_OUT)


def report(sub: argparse.ArgumentParser) -> None:
    """Add the options of `report`."""
    sub.add_argument("folders", nargs="+", metavar="RUN", help="the folder of a run or a demo, with summary.json")
    told = {
        "markdown": "the table and a frontier, whose figure goes to figures/ beside it",
        "html": "the same as one page that loads nothing",
        "json": "metrics and recipes",
        "csv": "every number with its interval or spread, unrounded",
        "latex": "the table as a tabular of booktabs",
    }
    for kind, what in told.items():
        sub.add_argument(f"--{kind}", metavar="FILE", help=f"write {what}")


def purge(sub: argparse.ArgumentParser) -> None:
    """Add the options of `purge`."""
    sub.add_argument("folder", metavar="RUN", help="the folder of a run, a sweep, an evaluation or an audit")
    sub.add_argument("--cache", help="the folder that was its --cache, where the same is removed for all runs")


def demo(sub: argparse.ArgumentParser) -> None:
    """Add the options of `demo`."""
    sub.add_argument("--corpus", default="builtin:pydoc", help="builtin:pydoc or builtin:devil")
    sub.add_argument("--seeds", type=int, nargs="+", default=[7], help="settings were chosen on seeds 0 to 4")
    sub.add_argument("--out", default="runs/demo", help="folder of the report (default runs/demo)")
    sub.add_argument("--clean-cache", action="store_true", help="remove the trained models and stop")
    add_progress(sub)


def _add_recipe(sub: argparse.ArgumentParser, default: str | None = None) -> None:
    without: dict[str, Any] = {} if default is None else {"nargs": "?", "default": default}
    recipe: Any = sub.add_argument("recipe", help=f"a YAML file or one of: {', '.join(shipped())}", **without)
    recipe.completer = lambda **asked: shipped()
    sub.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="a.b=c", help="keys of the recipe with other values"
    )


def _add_json(sub: argparse.ArgumentParser, what: str) -> None:
    sub.add_argument("--json", action="store_true", help=f"print {what} as JSON")
