"""`moe-unlearn mask`: makes a WAGLE mask, which an interrupted command goes on with, writes it and compares it."""

import argparse
import contextlib
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from torch import nn

from moe_unlearn import masks, progress, wagle
from moe_unlearn.cli import plan
from moe_unlearn.cli.arguments import loading_of, sets_of, writable
from moe_unlearn.cli.sides import batches_of, require_moe
from moe_unlearn.experts import enable
from moe_unlearn.files import stream_of
from moe_unlearn.masks import WeightMask
from moe_unlearn.model import loading
from moe_unlearn.model.batches import Batch
from moe_unlearn.prepare.reference import resume_of
from moe_unlearn.ranks import Ranks, everyone, on_first


def run(options: argparse.Namespace) -> None:
    """Compute a WAGLE mask and save it; the same command goes on where an earlier one was interrupted."""
    if options.dry_run:
        plan.show(options, plan.of_mask(options))
        return
    how = loading_of(options)
    writable(options.out)
    loading.check_whole(options.model, "a mask")
    model, tokenizer = loading.load_model(options.model, how)
    require_moe(model)
    with enable(model):
        batches = batches_of(options, model, tokenizer, sets_of(options, tokenizer))
        made = write_mask(options, model, **batches)
    why = "" if options.official else _why_fewer(made, options.keep)
    print(f"kept {made.fraction:.4f} of all weights (asked {options.keep:g}{why}); saved to {options.out}")


def _why_fewer(made: WeightMask, keep: float) -> str:
    """Return why a mask keeps fewer weights than asked, "" if it keeps as many."""
    total = sum(math.prod(shape) for shape in made.shapes.values())
    if made.fraction * total > keep * total - 1:
        return ""
    return "; the others have the score 0, as in experts that no token of a set reached, and never move"


def write_mask(
    options: argparse.Namespace, model: nn.Module, forget: Sequence[Batch], retain: Sequence[Batch]
) -> WeightMask:
    """Make and write the mask that the options ask for, and print in how many weights it differs from another.

    What was found of finished groups of weights stays in the folder OUT.groups until the mask is written.
    """
    rule = wagle.Rule(options.keep, options.gamma, options.official, options.accumulation)
    ranks = Ranks(model, everyone())
    other = None if options.compare is None else masks.load(options.compare, model)
    with contextlib.ExitStack() as inside:
        inside.enter_context(told())
        resume = None
        if not stream_of(options.out):
            groups = Path(f"{options.out}.groups")
            resume = inside.enter_context(resume_of(model, groups, alone=True, ranks=ranks))
        made = wagle.mask_of(model, forget, retain, rule, memory=options.memory, ranks=ranks, resume=resume)
        save = partial(masks.save, made, options.out, model, options.format)
        if made.shared:  # all ranks put it together
            save()
        else:
            on_first(save)
    if other is not None:
        differing = made.differing(other)
        most = sorted((name for name in differing if differing[name]), key=lambda name: -differing[name])[:5]
        named = "".join(f"; {name}: {differing[name]}" for name in most)
        total = sum(math.prod(shape) for shape in made.shapes.values())
        print(f"differs from {options.compare} in {sum(differing.values())} of {total} weights{named}")
    return made


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Print what the package logs, such as how long a mask will take, to stderr inside; only warnings with --quiet."""
    if not progress.form().bars:
        yield  # logging itself prints warnings
        return
    log, printed = logging.getLogger("moe_unlearn"), logging.StreamHandler(sys.stderr)
    before = log.level
    log.addHandler(printed)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(printed)
        log.setLevel(before)
