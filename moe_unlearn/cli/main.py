"""The command line: `moe-unlearn env | stats | mask | alternates | run | eval | audit | delta | ...` (see `--help`).

`torchrun -m moe_unlearn` starts it on several ranks (`launch`), which share the rows of `run`, `eval`, `audit`,
`stats`, `mask` and `alternates`.

Bad input ends with one line that says what was expected and what was given, and with exit code 2; `--traceback`
shows where it was found. Models are folders written by `save_pretrained`, or models of the hub by their ids; data are
whatever `data.load` reads: files, folders, benchmarks by name (`tofu:forget05`), hub data sets, `builtin:NAME`.
"""

import argparse
import io
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from moe_unlearn import backend, benchmark, data, masks, trace
from moe_unlearn.benchmark.trained_cache import clean_cache
from moe_unlearn.cli import alternates, audit, delta, env, evaluate, paths, plan, purge
from moe_unlearn.cli.arguments import (
    add_data,
    add_dry_run,
    add_loading,
    add_mesh,
    add_packing,
    examples_of,
    loading_of,
    positive,
    sets_of,
    steps,
    writable,
)
from moe_unlearn.cli.launch import REFUSED, Command, Outcome, launched
from moe_unlearn.cli.mask import told, write_mask
from moe_unlearn.cli.sides import batches_of, require_moe
from moe_unlearn.config import Recipe, models, shipped
from moe_unlearn.errors import NonFiniteError, NotPreparedError, RetainBudgetError, UnavailableError
from moe_unlearn.experts import enable
from moe_unlearn.files import write_json
from moe_unlearn.model import loading
from moe_unlearn.plan import Mesh
from moe_unlearn.ranks import Ranks, everyone, on_first
from moe_unlearn.regress import command as regression
from moe_unlearn.runs import report
from moe_unlearn.runs.folder import check_unused
from moe_unlearn.runs.lock import locked
from moe_unlearn.runs.run import Before, Run, retrained, unlearn
from moe_unlearn.runs.summary import check_name, table
from moe_unlearn.verify import VerificationError

_SHARED = ("run", "eval", "audit", "stats", "mask", "alternates")  # the verbs that several ranks can share
_BAD_INPUT = (
    ValueError,
    OSError,
    data.MissingLibraryError,
    NonFiniteError,
    RetainBudgetError,
    NotPreparedError,
    VerificationError,
    UnavailableError,
    backend.Unfit,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, as the console script does, on one process or on ranks; return the exit code."""
    return launched(partial(_chosen, arguments))


def _chosen(arguments: Sequence[str] | None) -> Command:
    parser = _parser()
    options = parser.parse_args(arguments)
    for name, value in vars(options).items():
        # as of a shell variable that is not set
        if value == "" and name != "system" or isinstance(value, list) and "" in value:
            parser.error(f"argument --{name.replace('_', '-')}: expected a value; got an empty one")
    refusal = _error(options, f"expected one process; ranks share the work of {', '.join(_SHARED)} only")
    return Command(partial(_outcome, options), "" if options.command in _SHARED else refusal)


def _error(options: argparse.Namespace, error: object) -> str:
    return f"moe-unlearn {options.command}: error: {error}"


def _outcome(options: argparse.Namespace) -> Outcome:
    for stream in (sys.stdout, sys.stderr):
        # in a locale without the tables' arrows, printing must not fail and lose the results of a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        paths.check(options)
        with paths.undone(options):
            return options.function(options) or 0, ""
    except _BAD_INPUT as error:
        sys.stdout.flush()  # fails if it was this that broke
        # without a buffer nothing is left that could fail; what breaks of a file has its name
        unread = isinstance(error, BrokenPipeError) and error.filename is None
        if options.traceback or unread:
            raise
        return REFUSED, _error(options, error)
    except KeyboardInterrupt:
        return 130, "interrupted; finished checkpoints are kept"


def stats(options: argparse.Namespace) -> None:
    """Print routing frequencies of forget and retain text, and the experts TRACE would select."""
    if options.dry_run:
        print(plan.of_stats(options))
        return
    how = loading_of(options)
    writable(options.out)
    model, tokenizer = loading.load_model(options.model, how)
    require_moe(model)
    sides = sets_of(options, tokenizer)
    ranks = Ranks(model, everyone())
    batches = batches_of(options, model, tokenizer, sides)
    forget, retain = (trace.routing_frequencies(model, batches[side], ranks) for side in ("forget", "retain"))
    selected = trace.select_experts(
        forget, retain, per_layer=options.per_layer, min_ratio=options.min_ratio, allow_empty=True
    )
    print(f"{'layer':<40} {'expert':>6} {'forget':>8} {'retain':>8} {'ratio':>7}")
    for layer, expert in selected.nonzero().tolist():
        f, r = (float(side.frequency[layer, expert]) for side in (forget, retain))
        ratio = f / r if r else float("inf")
        print(f"{forget.layers[layer]:<40} {expert:>6} {f:>8.4f} {r:>8.4f} {ratio:>7.2f}")
    print(
        f"{int(selected.sum())} experts selected in {len(forget.layers)} layers; "
        f"{forget.tokens} forget and {retain.tokens} retain tokens counted"
    )
    if options.out:
        content = {
            "forget": forget.to_dict() | {"counts": forget.counts.tolist()},
            "retain": retain.to_dict() | {"counts": retain.counts.tolist()},
            "selected": selected.nonzero().tolist(),
        }
        on_first(partial(write_json, options.out, content))


def mask(options: argparse.Namespace) -> None:
    """Compute a WAGLE mask and save it; the same command goes on where an earlier one was interrupted."""
    if options.dry_run:
        print(plan.of_mask(options))
        return
    how = loading_of(options)
    writable(options.out)
    model, tokenizer = loading.load_model(options.model, how)
    require_moe(model)
    with enable(model):
        batches = batches_of(options, model, tokenizer, sets_of(options, tokenizer))
        made = write_mask(options, model, **batches)
    print(f"kept {made.fraction:.4f} of all weights (asked {options.keep:g}); saved to {options.out}")


@told()
def run(options: argparse.Namespace) -> None:
    """Unlearn: read a recipe, a model and the data, train, evaluate, report."""
    how = loading_of(options)
    mesh = None if options.mesh is None else Mesh.parse(options.mesh)
    if not options.dry_run and options.fits is not None:
        raise ValueError("--fits asks for a plan, and goes with --dry-run")
    known = options.model_config if options.model_config in models() else None
    recipe = Recipe.load(options.recipe, [*_data_overrides(options), *options.set], model=known)
    check_name(recipe.name)
    base = delta.base_of_run(recipe, how, Path(options.out)) if options.delta else None
    if options.model_config is not None and recipe.data.model is None:
        if not options.dry_run:
            raise ValueError("data.model is missing: --model-config alone gives no weights, only a --dry-run")
        print(plan.of_config(options, recipe, mesh))
        return
    for key in ("model", "forget", "retain"):
        if getattr(recipe.data, key) is None:
            raise ValueError(f"data.{key} is missing: give --{key} or set it in the recipe")
    with ExitStack() as held:
        if not options.dry_run:
            writable(options.out, folder=True)
            own, mask = recipe.data, None if recipe.wagle is None else recipe.wagle.mask
            paths.check(options, (own.model, own.forget, own.retain, own.holdout, own.reference, mask))
            on_first(lambda: held.enter_context(locked(Path(options.out))))
            if not (options.resume or options.overwrite):
                on_first(partial(check_unused, Path(options.out)))
        _run(options, recipe, how, mesh, base)


def _run(
    options: argparse.Namespace, recipe: Recipe, how: loading.Loading, mesh: Mesh | None, base: Path | None
) -> None:
    """Plan or make the run of a recipe with model and data."""
    assert recipe.data.model is not None
    tokenizer = loading.load_tokenizer(recipe.data.model, how)
    reports: dict[str, data.DataReport] = {}
    kept = {"alternates": recipe.forget.replacement == "alternate", "cache": options.cache}
    sets = {
        side: examples_of(getattr(recipe.data, side), tokenizer, recipe.data, side, reports, **kept)
        for side in ("forget", "retain", "holdout")
        if getattr(recipe.data, side) is not None
    }
    data.check_apart(sets["forget"], sets["retain"])
    for side, rows in (("forget", recipe.data.forget_rows), ("retain", recipe.data.retain_rows)):
        reports[side].rows = len(sets[side])
        if rows is not None and rows < len(sets[side]):
            print(f"{side}: {rows:,} of {len(sets[side]):,} rows are drawn, data.{side}_rows", file=sys.stderr)
            sets[side] = data.draw(sets[side], rows, seed=recipe.seed)
            reports[side].rows = rows
    retrain = None
    if not options.dry_run and not options.no_eval:
        retrain = retrained(recipe, tokenizer, sets, how)  # that model is gone before the other one comes
    if options.dry_run and mesh is not None:
        print(plan.of_mesh(options, recipe, mesh, tokenizer, sets))
        return
    model, _ = loading.load_model(recipe.data.model, how)
    require_moe(model)
    if options.dry_run:
        print(plan.of_weights(options, Run(model, tokenizer, recipe, sets["forget"], sets["retain"])))
        return
    if base is not None:
        delta.check_saved(model, base)
    before = Before(loading.described(model, recipe.data.model, how), reports, retrain)
    out = Path(options.out)
    # the cache folder changes no result, so it is not part of the recipe
    summary = unlearn(
        model,
        tokenizer,
        recipe,
        sets,
        out,
        existing="resume" if options.resume else "overwrite" if options.overwrite else "refuse",
        evaluate=not options.no_eval,
        cache_dir=None if options.cache is None else Path(options.cache),
        verify=options.verify,
        known=before,
    )
    if summary is None and (base is None or (out / delta.FILE).exists()):
        return
    print(f"model: {out / 'model'}")
    if base is not None:
        on_first(partial(delta.write_of_run, recipe, base, out))
    if options.verify:
        print(f"verified: {out / 'verified.txt'}")
    if summary:
        _print_run(out, summary)


def write_report(options: argparse.Namespace) -> None:
    """Rebuild report.md and the figures of a run folder from its summary.json."""
    folder = Path(options.folder)
    print(*report.write(folder, report.read(folder)), sep="\n")


def demo(options: argparse.Namespace) -> None:
    """Run the embedded experiment: target, retrain, baselines, each lever, and the three together."""
    if options.clean_cache:
        print(f"removed {clean_cache()} cached models")
        return
    out = Path(options.out)
    _print_run(out, benchmark.demo(options.corpus, options.seeds, out))


def kernels(options: argparse.Namespace) -> int:
    """Test kernels, ours or yours, for regressions: are they as right, as fast and as lean as they were?"""
    return regression.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moe-unlearn", description="Unlearn Mixture-of-Experts models.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, function: Callable[[argparse.Namespace], int | None]) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=(function.__doc__ or "").partition("\n")[0], description=function.__doc__)
        sub.set_defaults(function=function)
        sub.add_argument("--traceback", action="store_true", help="show where an error was found")
        return sub

    command("env", env.run)
    sub = command("stats", stats)
    add_data(sub)
    add_packing(sub)
    sub.add_argument("--per-layer", type=int, default=2)
    sub.add_argument("--min-ratio", type=float, default=1.5)
    add_mesh(sub)
    add_dry_run(sub)
    sub.add_argument("--out", help="write the frequencies as JSON")
    sub = command("mask", mask)
    add_data(sub)
    add_packing(sub)
    sub.add_argument("--keep", type=float, default=0.8, help="fraction of the weights that may move")
    sub.add_argument("--gamma", type=float, default=1.0)
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
        choices=masks.FORMATS,
        default="native",
        help="native: safetensors, a bit for "
        "each weight; official: the WAGLE code's {name: bool tensor}, expert by expert",
    )
    add_mesh(sub)
    add_dry_run(sub)
    sub.add_argument("--out", required=True, help="the file to write; wagle.mask of a recipe reads both formats")
    sub.add_argument("--compare", metavar="MASK", help="count the weights in which the mask differs from this file's")
    alternates.add_arguments(command("alternates", alternates.run))
    sub = command("run", run)
    sub.epilog = (
        "Started by torchrun, N processes share the rows: batch_size is that of each, so that a step takes N x "
        "batch_size x accumulate forget rows, and its weights are those of one process with N x accumulate."
    )
    sub.add_argument("recipe", help=f"a YAML file or one of: {', '.join(shipped())}")
    sub.add_argument("--set", nargs="+", action="extend", default=[], metavar="a.b=c", help="override keys")
    sub.add_argument("--model", help="data.model")
    add_loading(sub)
    sub.add_argument(
        "--model-config",
        metavar="NAME",
        help=f"take the recipe's values for one of: "
        f"{', '.join(models())}; with --dry-run and without --model plan for it, or for the folder or "
        "config.json given, without weights and data",
    )
    for side in ("forget", "retain", "holdout", "reference"):
        sub.add_argument(f"--{side}", help=f"data.{side}")
    sub.add_argument("--out", default="runs/unlearn", help="folder of the run")
    sub.add_argument(
        "--cache", help="folder of examples and reference values that runs share; default: OUT/cache for the references"
    )
    sub.add_argument("--dry-run", action="store_true", help="print the plan and stop")
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
    sub.add_argument("--no-eval", action="store_true", help="skip the metrics before and after")
    sub.add_argument("--delta", action="store_true", help=f"also write what changed since --model, as OUT/{delta.FILE}")
    evaluate.add_arguments(command("eval", evaluate.run))
    audit.add_arguments(command("audit", audit.run))
    delta.add_arguments(command)
    sub = command("report", write_report)
    sub.add_argument("folder", help="a run folder with summary.json")
    purge.add_arguments(command("purge", purge.run))
    sub = command("demo", demo)
    sub.add_argument("--corpus", default="builtin:pydoc", help="builtin:pydoc or builtin:devil")
    sub.add_argument("--seeds", type=int, nargs="+", default=[7], help="settings were chosen on seeds 0 to 4")
    sub.add_argument("--out", default="runs/demo")
    sub.add_argument("--clean-cache", action="store_true", help="remove the trained models and stop")
    regression.add_arguments(command("kernels", kernels))
    return parser


def _data_overrides(options: argparse.Namespace) -> list[str]:
    keys = ("model", "forget", "retain", "holdout", "reference")
    return [f"data.{k}={json.dumps(getattr(options, k))}" for k in keys if getattr(options, k) is not None]


def _print_run(out: Path, summary: dict) -> None:
    """Print the table of a finished run and the paths of its report, which is already written."""
    print(table(summary))
    print(*(out / "report.md", *sorted((out / "figures").glob("*.png"))), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
