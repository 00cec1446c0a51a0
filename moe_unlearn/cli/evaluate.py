"""`moe-unlearn eval`, which measures a model on the user's own text or on a benchmark's sets."""

import argparse
import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from moe_unlearn import data, metrics
from moe_unlearn.cli import plan
from moe_unlearn.cli.arguments import chat_of, loading_of, sets_of, writable
from moe_unlearn.files import make_private, write_json, write_text
from moe_unlearn.model import loading
from moe_unlearn.ranks import on_first

# benchmark -> its function, the class of its sets (None: the user chooses their names), the class of its settings
_BENCHMARKS: dict[str, tuple[Callable[..., dict[str, float | None]], Any, Callable[..., Any] | None]] = {
    "muse": (metrics.evaluate_muse, metrics.MuseData, metrics.MuseSettings),
    "tofu": (metrics.evaluate_tofu, metrics.TofuData, metrics.TofuSettings),
    "wmdp": (metrics.evaluate_choices, None, None),
    "rwku": (metrics.evaluate_rwku, metrics.RwkuData, metrics.RwkuSettings),
    "completions": (metrics.evaluate_completions, None, metrics.CompletionSettings),
}


def run(options: argparse.Namespace) -> None:
    """Measure a model on forget, retain and holdout text, or with --benchmark; print and save the metrics."""
    for name in ("relearn", "gradient_norm"):
        if options.mesh and getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')} needs whole weights on every rank; leave out --mesh")
    how = loading_of(options)
    for name in ("benchmark", "relearn"):
        if options.dry_run and getattr(options, name):
            raise ValueError(f"--dry-run plans what --forget and --retain are measured by; leave out --{name}")
    if options.benchmark:
        if options.before or options.relearn:
            raise ValueError("--before and --relearn are for --forget and --retain; leave out --benchmark")
        _benchmark(options, how)
        return
    for name in ("data", "reference_run", "classifier", "label", "like", "gradient_norm", "redact"):
        if getattr(options, name):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is for a --benchmark; give --forget and --retain without one")
    for side in ("forget", "retain"):
        if getattr(options, side) is None:
            raise ValueError(f"--{side} is missing; or give a --benchmark with its --data")
    if options.reference and not options.holdout:
        raise ValueError("--reference is for privleak, which needs --holdout too")
    if options.dry_run:
        plan.show(options, plan.of_eval(options))
        return
    writable(options.out)
    if options.before is not None:
        loading.located(options.before)  # it is loaded only when the model has been measured
    tokenizer = loading.load_tokenizer(options.model, how)
    sets: dict[str, Any] = sets_of(options, tokenizer, ("forget", "retain", "holdout"))
    # one model at a time is in memory
    reference_auc = None
    if options.reference is not None:
        reference_auc = metrics.min_k_auc(
            loading.load_model(options.reference, how)[0], tokenizer, sets["forget"], sets["holdout"]
        )
    effects = None
    if options.before or options.relearn:
        effects = metrics.SideEffects(
            tokenizer,
            forget=sets["forget"],
            retain=sets["retain"],
            relearn_steps=options.relearn,
            relearn_lr=options.relearn_lr,
            batch_size=options.batch_size,
        )
    model, _ = loading.load_model(options.model, how)
    result: dict[str, Any] = metrics.evaluate(model, tokenizer, **sets, reference_auc=reference_auc)
    if effects is not None:
        effects.observe(model, compared=options.before is not None)
        del model
        result |= effects.findings(None if options.before is None else loading.load_model(options.before, how)[0])
    for name, value in result.items():
        if name == "relearning":
            value = ", ".join(f"{v['nll']:.3f} at {i}" for i, v in zip(value["steps"], value["values"], strict=True))
        print(f"{name:<15} {f'{value:.4f}' if isinstance(value, float) else value}")
    if options.out:
        on_first(partial(write_json, options.out, result))


def _benchmark(options: argparse.Namespace, how: loading.Loading) -> None:
    named = [entry.partition("=") for entry in options.data]
    if not named or not all(source for _, _, source in named):
        raise ValueError(f"--benchmark needs --data NAME=SOURCE ...; got {' '.join(options.data) or 'none'}")
    sources = {name: source for name, _, source in named}
    if len(sources) < len(named):
        raise ValueError(f"--data names a set twice: {' '.join(options.data)}")
    evaluation, kind, settings = _BENCHMARKS[options.benchmark]
    if options.reference_run and options.benchmark not in ("muse", "tofu"):
        raise ValueError(f"--reference-run is for muse and tofu; {options.benchmark} is compared with no other run")
    if options.like and options.benchmark not in ("muse", "tofu"):
        raise ValueError(f"--like is for muse and tofu; got --benchmark {options.benchmark}")
    for name in ("gradient_norm", "reference"):
        if getattr(options, name) and options.benchmark not in ("muse", "tofu"):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is for the attacks of muse and tofu; got --benchmark {options.benchmark}")
    judged = {options.classifier is not None, options.label is not None}
    if len(judged) > 1 or (True in judged and options.benchmark != "completions"):
        raise ValueError("--classifier FOLDER and --label NAME go together, with --benchmark completions")
    sets = [field.name for field in fields(kind)] if kind else sources
    if unknown := sources.keys() - sets:
        raise ValueError(f"{options.benchmark} has no set {min(unknown)!r}; expected some of {', '.join(sets)}")
    writable(options.out, folder=True)
    rows = {name: _rows(source) for name, source in sources.items()}
    if options.like and settings:
        settings = partial(metrics.like, options.like, settings)
    more: dict[str, Any] = {"settings": settings(chat=chat_of(options))} if settings else {}
    if options.reference_run:
        more["reference_run"] = options.reference_run
    if options.gradient_norm:
        more["gradient_norm"] = True
    if options.reference:
        loading.located(options.reference)  # it is loaded when its attack begins
        more["reference_model"] = lambda: loading.load_model(options.reference, how)[0]
    if options.classifier:
        more["classifier"] = metrics.Classifier(*loading.load_classifier(options.classifier, how), options.label)
    model, tokenizer = loading.load_model(options.model, how)
    with _results_in(options) as out:
        result = evaluation(
            model,
            tokenizer,
            kind(**rows) if kind else rows,
            out=out,
            cache_dir=options.cache,
            batch_size=options.batch_size,
            **more,
        )
    for name, value in result.items():
        print(f"{name:<28} {'-' if value is None else format(value, '.4g')}")


@contextlib.contextmanager
def _results_in(options: argparse.Namespace) -> Iterator[Path | None]:
    """Yield the folder that a benchmark writes to; with --redact one whose files, without their texts, go to --out."""
    if options.out is None:
        yield None
        return
    out = Path(options.out)
    if not options.redact:
        make_private(out)
        yield out
        return
    with tempfile.TemporaryDirectory() as private:
        yield Path(private)
        make_private(out)
        for path in Path(private).iterdir():  # none on ranks that do not write
            content = json.loads(path.read_text(encoding="utf-8"))
            if path.stem.endswith("_EVAL"):
                content = {key: _redacted(result) for key, result in content.items()}
            write_text(out / path.name, json.dumps(content, indent=4, sort_keys=True) + "\n")


def _redacted(value: Any) -> Any:
    """Return a value of JSON in which null stands for each text."""
    if isinstance(value, dict):
        return {key: _redacted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_redacted(item) for item in value]
    return None if isinstance(value, str) else value


def _rows(source: str) -> list:
    """Return the records of a file as they are, whatever their fields, or the documents of another source."""
    if data.files.file_format(Path(source)) not in data.files.SUFFIXES:
        return [*data.load(source)]
    return [record for record, _ in data.files.records(Path(source))]
