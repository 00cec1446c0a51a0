"""`moe-unlearn run`, which unlearns: it reads a recipe, a model and data, trains, measures and reports."""

import argparse
import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from moe_unlearn import data
from moe_unlearn.cli import adapter, delta, paths, plan
from moe_unlearn.cli.arguments import earlier_of, examples_of, loading_of, writable
from moe_unlearn.cli.mask import told
from moe_unlearn.cli.options import DELTA
from moe_unlearn.cli.rows import take_rows
from moe_unlearn.cli.sides import require_moe
from moe_unlearn.config import Recipe, models
from moe_unlearn.config.adapter import bits_of
from moe_unlearn.model import loading
from moe_unlearn.page.terminal import fitted
from moe_unlearn.plan import Mesh
from moe_unlearn.ranks import on_first
from moe_unlearn.runs.folder import check_unused, dated
from moe_unlearn.runs.lock import locked
from moe_unlearn.runs.measured import retrained
from moe_unlearn.runs.names import PAGES
from moe_unlearn.runs.own_texts import assumed
from moe_unlearn.runs.run import Run
from moe_unlearn.runs.summary import check_name, tabular
from moe_unlearn.runs.unlearn import Before, unlearn
from moe_unlearn.trainer.arguments import checked

_RUNS = Path("runs")  # where the folders of runs without an --out stand


@told()
def run(options: argparse.Namespace) -> None:
    """Unlearn: read a recipe, a model and the data, train, evaluate, report."""
    how = loading_of(options)
    mesh = None if options.mesh is None else Mesh.parse(options.mesh)
    if not options.dry_run and options.fits is not None:
        raise ValueError("--fits asks for a plan, and goes with --dry-run")
    known = options.model_config if options.model_config in models() else None
    overrides = [*_data_overrides(options), *adapter.overrides(options), *options.set]
    recipe = adapter.chosen(options, Recipe.load(options.recipe, overrides, model=known), mesh)
    check_name(recipe.name)
    checked(recipe.trainer)
    if options.out is None and (options.resume or options.overwrite):
        raise ValueError("--resume and --overwrite are about the folder that a run has used: give it as --out")
    base = delta.base_of_run(recipe, how, Path(options.out or _RUNS / "new")) if options.delta else None
    if options.model_config is not None and recipe.data.model is None:
        if not options.dry_run:
            raise ValueError(
                "data.model is missing: --model-config alone gives no weights, only a --dry-run: give --model too"
            )
        plan.show(options, plan.of_config(options, recipe, mesh))
        return
    for key in ("model", "forget", "retain"):
        if getattr(recipe.data, key) is None:
            raise ValueError(f"data.{key} is missing: give --{key} or set it in the recipe")
    new = options.out is None
    with ExitStack() as held:
        if not options.dry_run:
            if new:
                options.out = str(held.enter_context(dated(_RUNS, recipe.name)))
            writable(options.out, folder=True)
            own, mask = recipe.data, None if recipe.wagle is None else recipe.wagle.mask
            sources = (own.forget, own.retain, str(own.retain_eval), own.unseen, own.holdout, *own.earlier)
            paths.check(options, (own.model, *sources, own.reference, mask))
            on_first(lambda: held.enter_context(locked(Path(options.out))))
            if not (options.resume or options.overwrite):
                on_first(partial(check_unused, Path(options.out)))
        _run(options, recipe, adapter.rounding(recipe, how, planned=options.dry_run), mesh, base, new=new)


def _run(
    options: argparse.Namespace,
    recipe: Recipe,
    how: loading.Loading,
    mesh: Mesh | None,
    base: Path | None,
    *,
    new: bool,
) -> None:
    """Plan or make the run of a recipe with model and data."""
    assert recipe.data.model is not None
    tokenizer = loading.load_tokenizer(recipe.data.model, how)
    reports: dict[str, data.DataReport] = {}
    kept = {"alternates": recipe.forget.replacement == "alternate", "cache": options.cache}
    sets = {
        side: examples_of(getattr(recipe.data, side), tokenizer, recipe.data, side, reports, **kept)
        for side in ("forget", "retain", "unseen", "holdout")
        if getattr(recipe.data, side) is not None
    }
    take_rows(recipe, tokenizer, sets, reports, options.cache)
    data.check_unseen(sets)
    if recipe.data.earlier:
        sets["earlier"] = earlier_of(recipe, tokenizer, sets["forget"], reports, cache=options.cache)
    if options.dry_run:
        sets["sampled"] = assumed(recipe)
    retrain = None
    if not options.dry_run and not options.no_eval:
        retrain = retrained(recipe, tokenizer, sets, how)  # that model is gone before the other one comes
    if options.dry_run and (mesh is not None or bits_of(recipe.adapter) is not None):
        plan.show(options, plan.of_mesh(options, recipe, mesh, tokenizer, sets))
        return
    model, _ = loading.load_model(recipe.data.model, how)
    require_moe(model)
    if options.dry_run:
        plan.show(options, plan.of_weights(options, Run(model, tokenizer, recipe, sets)))
        return
    if base is not None:
        delta.check_saved(model, base)
    shown = {"samples": 0} if options.no_samples else {}
    loaded = loading.described(model, recipe.data.model, how)
    before = Before(loaded, reports, retrain, command=options.command_line, new=new, **shown)
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
    if summary is None and (base is None or (out / DELTA).exists()):
        return
    print(f"model: {out / 'model'}")
    if base is not None:
        on_first(partial(delta.write_of_run, recipe, base, out))
    if options.verify:
        print(f"verified: {out / 'verified.txt'}")
    if summary:
        print_run(out, summary)


def _data_overrides(options: argparse.Namespace) -> list[str]:
    keys = ("model", "forget", "retain", "retain_eval", "unseen", "holdout", "earlier", "reference")
    return [f"data.{k}={json.dumps(getattr(options, k))}" for k in keys if getattr(options, k) is not None]


def print_run(out: Path, summary: dict) -> None:
    """Print the table of a finished run and the paths of its report, which is already written."""
    print(*fitted(*tabular(summary)), sep="\n")
    print(*(out / name for name in PAGES), sep="\n")
