"""The verb `warmup`: compiles the Triton kernels of a run beforehand, into a cache that can go to another machine."""

import argparse
import os
import time
from pathlib import Path

from moe_unlearn import progress
from moe_unlearn.config import Recipe, models
from moe_unlearn.regress.beforehand import compile_all, launches_of, settled_cache, target_of
from moe_unlearn.runs.warmup import calls_of


def run(options: argparse.Namespace) -> int:
    """Compile the GPU kernels of a model and a recipe beforehand, without weights, data or the GPU itself."""
    target = target_of(options.gpu)
    recipe = Recipe.load(options.recipe, options.set, model=options.model if options.model in models() else None)
    start = time.monotonic()
    calls = calls_of(options.model, recipe, dtype=options.dtype, lengths=options.lengths)
    moved = settled_cache(Path(options.cache)) if options.cache else 0
    launches = launches_of(calls, target)
    name = options.gpu or "the GPU here"
    progress.say(f"warmup: {len(launches)} kernels for {name}, sm_{target.architecture}")
    done = []
    for made in compile_all(launches, processes=options.jobs):
        done.append(made)
        found = made.error or ("found compiled" if made.cached else f"{made.seconds:.1f} s")
        print(f"{made.kernel:<48} {found}", flush=True)
    failed = sum(bool(made.error) for made in done)
    cached = sum(made.cached for made in done)
    where = options.cache or "Triton's cache"
    print(
        f"{len(done)} kernels of {recipe.name} on {options.model} for sm_{target.architecture}: "
        f"{len(done) - cached - failed} compiled, {cached} found compiled, {failed} failed; "
        f"{time.monotonic() - start:.1f} s"
    )
    if moved:
        print(f"{moved} kernels of {where} were compiled in another folder and lie here now")
    if options.cache:
        print(f"runs take them with TRITON_CACHE_DIR={os.path.abspath(options.cache)}")
    return int(failed > 0)
