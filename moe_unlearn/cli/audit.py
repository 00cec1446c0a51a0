"""`moe-unlearn audit`, which tries to bring back what a model was made to forget, and says whether it came."""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn import data, progress
from moe_unlearn.audit import ATTACKS, Report, Settings
from moe_unlearn.audit.documents import content_of
from moe_unlearn.audit.report import NAMES
from moe_unlearn.audit.run import audit
from moe_unlearn.audit.summary import rows, summary
from moe_unlearn.cli.arguments import examples_of, loading_of, sets_of, writable
from moe_unlearn.config import Recipe
from moe_unlearn.files import make_private
from moe_unlearn.model import loading
from moe_unlearn.model.adapters import merged
from moe_unlearn.model.saving import has_adapters
from moe_unlearn.ranks import on_first

_RECIPE = "recipe.yaml"


def run(options: argparse.Namespace) -> None:
    """Try to bring the forgotten documents back by every attack, and report whether they are gone or hidden."""
    how = loading_of(options)
    attacks = list(ATTACKS) if options.attacks is None else [name for name in options.attacks.split(",") if name]
    if unknown := [name for name in attacks if name not in ATTACKS]:
        raise ValueError(f"expected --attacks among {', '.join(ATTACKS)}; got {unknown[0]!r}")
    out = Path(options.out)
    writable(out, folder=True)
    for folder in filter(None, (options.model, options.before, options.reference)):
        loading.check_whole(folder, "an audit")  # they are loaded one after the other, long after this
    tokenizer = loading.load_tokenizer(options.model, how)
    sets: dict[str, Any] = sets_of(options, tokenizer, ("forget", "retain", "holdout"))
    trained = trained_on(options, tokenizer)
    on_first(partial(make_private, out))
    report = audit(
        partial(_loaded, options.model, how),
        tokenizer,
        before=partial(_loaded, options.before, how),
        reference=None if options.reference is None else partial(_loaded, options.reference, how),
        **sets,
        out=out,
        trained=trained,
        attacks=attacks,
        minutes=options.budget,
        cache_dir=options.cache or out / "cache",
        batch_size=options.batch_size,
        say=progress.say,
        settings=Settings(relearn_steps=options.relearn_steps, relearn_lr=options.relearn_lr, seed=options.seed),
    )
    _print(report, out)


def trained_on(options: argparse.Namespace, tokenizer: Tokenizer) -> set[tuple[int, ...]]:
    """Return the content of all rows that the run which made a model, RUN/model, says that it was trained on.

    RUN/recipe.yaml names the sources of the sides that are trained on, forget, retain and unseen, which are read again
    and cut as the audit's rows are. Where a source is not there any more, stderr says that nothing is known.
    """
    folder = Path(options.model).resolve().parent
    if not (folder / _RECIPE).is_file():
        return set()
    try:
        recipe = Recipe.load(folder / _RECIPE)
        sides = ("forget", "retain", "unseen")
        sources = {side: source for side in sides if (source := getattr(recipe.data, side)) is not None}
        found = [examples_of(source, tokenizer, options, side) for side, source in sources.items()]
    except (OSError, ValueError, data.MissingLibraryError) as error:
        print(
            f"what {options.model} was trained on cannot be read, {error}: holdout rows among it stay", file=sys.stderr
        )
        return set()
    return {content_of(row) for own in found for row in own}


def _loaded(folder: str, how: loading.Loading) -> Any:
    """Return the model of a folder; of an adapter its base with the adapter added, whose weights are those compared."""
    model = loading.load_model(folder, how)[0]
    return merged(model) if has_adapters(model) else model


def _print(report: Report, out: Path) -> None:
    for title, _, sign, verdict in rows(report):
        print(f"{title:<24} {verdict:<11} {sign}")
    print(f"\n{report.verdict}: {summary(report)}")
    print(*(out / name for name in NAMES), sep="\n")
