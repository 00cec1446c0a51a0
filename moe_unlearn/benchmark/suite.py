"""Benchmark suite, which runs recipes on a model and two sets of documents and returns a table of metrics.

table = benchmark.unlearning("models/olmoe", forget, retain, ["npo", "trace", "combined"], seeds=(0, 1, 2))
print(table.to_markdown())
"""

import copy
import dataclasses
import hashlib
import inspect
import itertools
import json
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import get_constant_schedule_with_warmup

from moe_unlearn import __version__, data, metrics, trace
from moe_unlearn.benchmark.table import RETRAIN, Table, checked
from moe_unlearn.config import Data, Recipe
from moe_unlearn.data import Document, Example
from moe_unlearn.data.pairs import carry_loss
from moe_unlearn.files import write_text
from moe_unlearn.metrics.evaluate import NAMES as EVALUATED
from moe_unlearn.model import loading
from moe_unlearn.model.batches import beside
from moe_unlearn.prepare.reference import model_digest
from moe_unlearn.runs.run import SIDES, Run
from moe_unlearn.step import UnlearnStep

Model = nn.Module | str | Path | Callable[[], object]
Sets = dict[str, list[Example]]
Metric = str | Callable[[nn.Module, object, Sets], Mapping[str, float]]
Item = Example | Document | str | Mapping
OnStep = Callable[["Progress"], None]

NAMES = (*EVALUATED, "routing_drift")
_ROWS, _TABLE = "rows", "table.json"


@dataclass(frozen=True)
class Progress:
    """Progress of a run: `step` is 0 after the preparation, then counts the steps; `metrics` are the step's."""

    run: str
    seed: int
    step: int
    last: bool
    metrics: dict[str, float]
    unlearn_step: UnlearnStep


def unlearning(
    model: Model,
    forget: Sequence[Item],
    retain: Sequence[Item],
    recipes: Sequence[str | Path | Recipe | Mapping],
    metrics: Sequence[Metric] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    evaluation: Mapping[str, Sequence[Item]] | None = None,
    baselines: Mapping[str, Model] | None = None,
    seeds: Sequence[int] = (0,),
    max_length: int | None = None,
    out: str | Path | None = None,
    on_step: Callable[[Progress], None] | None = None,
) -> Table:
    """Unlearn `forget` by each recipe from a fresh copy of `model` and measure; return a row for each run and seed.

    Args:
        model: a model (copied for each run, itself untouched); the folder of one, or ORG/NAME[@REVISION] on the hub,
            loaded to the GPU where there is one; or a function that makes one anew at every call, wherever it likes,
            and returns the model, or the pair of model and tokenizer.
        forget, retain: the data that unlearning sees: texts, records and `Document`s, encoded as the data sections of
            the recipes say (which must agree), or `Example`s, in a list or a `datasets.Dataset` (`data.encode_side`).
            A recipe with `data.forget_rows` or `data.retain_rows` unlearns on so many of them, drawn by the seed.
        recipes: names of shipped recipes, paths of YAML files, `Recipe`s or mappings of their keys; the row has the
            recipe's name.
        metrics: names among `NAMES`, and functions (model, tokenizer, sets) -> {name: number}, called in this order in
            evaluation mode; they leave the model as they found it. Default: every name that the sets allow.
        tokenizer: needed with a model in memory; a folder has its own.
        evaluation: further sets by name, to measure on: "holdout", unseen documents, for `minkauc`; "forget" and
            "retain" to measure on other data than unlearning saw; any other name is for functions, which get all sets
            in `sets`.
        baselines: models measured as they are, a row each. Default: {"target": model}. With one named "retrain", which
            never saw `forget`, and `minkauc`, every row has `privleak`.
        max_length: tokens of an example, at most, instead of the recipes' `data.max_length`.
        seeds: each recipe runs once for each, instead of its own `seed`. A baseline is measured once.
        out: a folder where each finished row is kept under the content of model, data, recipe and metrics (of a
            function its name and source text), so that an interrupted call continues with the run it was in. It also
            gets `table.json`.
        on_step: called after each run's preparation and steps; not for rows found in `out`.

    Rows also have `seconds`, spent in preparation and steps, and, for recipes that count routing, `routing_drift`.
    Everything but `seconds` is deterministic on one machine; the global random state is restored. Bad input raises
    ValueError (TypeError for a wrong kind) before the first model runs.
    """
    chosen = _recipes(recipes)
    for name, given_sets in (("evaluation", evaluation), ("baselines", baselines)):
        _check_kind(name, given_sets or {}, Mapping, "a mapping by name")
    asked = _metrics(metrics, evaluation or {}, baselines or {})
    _check_kind("seeds", seeds, Sequence, "a list of integers")
    if not seeds or len(set(seeds)) < len(seeds) or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ValueError(f"expected different seeds, integers from 0; got {list(seeds)}")
    if not chosen and baselines is not None and not baselines:
        raise ValueError("expected recipes to run or baselines to measure; got neither")
    if twice := {recipe.name for recipe in chosen} & {"target" if baselines is None else None, *(baselines or {})}:
        raise ValueError(f"a recipe and a baseline are both named {sorted(twice)[0]!r}")
    given = {"forget": forget, "retain": retain}, dict(evaluation or {})
    for side, items in (*given[0].items(), *given[1].items()):
        data.check_rows(side, items)
    source = _Source("model", model, tokenizer)
    sources = {"target": source}
    if baselines is not None:
        sources = {
            name: source if made is model else _Source(name, made, source.tokenizer) for name, made in baselines.items()
        }
    encode = partial(_encoded, tokenizer=source.tokenizer, settings=_encoding(chosen, given, max_length))
    replaced = any(recipe.forget.replacement == "alternate" for recipe in chosen)
    trained = {side: encode(side, items, alternates=replaced) for side, items in given[0].items()}
    further = {side: encode(side, items, alternates=False) for side, items in given[1].items()}
    sets = trained | further
    data.check_apart(**trained)
    rows = _Rows(out, source.tokenizer, trained, sets, asked)
    results: dict[int, dict[str, dict[str, float]]] = {seed: {} for seed in seeds}

    def as_it_is(baseline: _Source) -> dict[str, float]:
        return _measure(baseline.fresh().eval(), source.tokenizer, sets, asked)

    def unlearned(recipe: Recipe) -> dict[str, float]:
        return _run(source, trained, sets, recipe, asked, on_step or (lambda progress: None))

    with torch.random.fork_rng(range(torch.cuda.device_count())):
        for name, baseline in sources.items():
            values = rows.get(name, None, baseline, partial(as_it_is, baseline))
            for seed in seeds:
                results[seed][name] = dict(values)
        for recipe, seed in itertools.product(chosen, seeds):
            seeded = dataclasses.replace(recipe, seed=seed)
            results[seed][recipe.name] = rows.get(recipe.name, seeded, source, partial(unlearned, seeded))
    table = Table.joined([Table(results)])
    if out is not None:
        write_text(Path(out) / _TABLE, table.to_json() + "\n")
    return table


def _run(
    source: "_Source", trained: Sets, sets: Sets, recipe: Recipe, asked: Sequence[Metric], on_step: OnStep
) -> dict[str, float]:
    torch.manual_seed(recipe.seed)
    run = Run(source.fresh(), source.tokenizer, recipe, **trained)
    step, seconds = _unlearn(run, on_step)
    values = _measure(run.model.eval(), source.tokenizer, sets, asked) | {"seconds": seconds}
    counted = step.prepared.frequencies
    if counted is not None and "routing_drift" in asked:
        batches = data.batches(run.pairs.forget, 32, pad_id=data.pad_token_id(source.tokenizer))
        after = trace.routing_frequencies(run.model, [beside(batch, run.model) for batch in batches])
        values["routing_drift"] = metrics.routing_drift(counted["forget"].frequency, after.frequency)[1]
    return values


def _unlearn(run: Run, on_step: OnStep) -> tuple[UnlearnStep, float]:
    """Make the steps of a run; return the step and the seconds spent in it.

    The loop is not `UnlearnTrainer`'s, which would change the numbers of earlier tables: it draws other rows, ends a
    step where an epoch ends, and switches a model in evaluation mode to training.
    """
    recipe, start = run.recipe, time.perf_counter()
    step = UnlearnStep(run.model, recipe)
    step.prepare(*map(run.batches, SIDES))
    warmup = get_constant_schedule_with_warmup(step.optimizer, recipe.optimizer.warmup_steps)
    seconds = time.perf_counter() - start
    on_step(Progress(recipe.name, recipe.seed, 0, False, {}, step))
    for i in range(recipe.steps):
        start = time.perf_counter()
        batches = [run.micro_batch(i * recipe.accumulate + part) for part in range(recipe.accumulate)]
        micro_batches = [(batch["forget"], batch["retain"]) for batch in batches]
        sizes = step.sizes(micro_batches) if len(micro_batches) > 1 else None
        for sides in micro_batches:
            values = step(*sides, update=sides is micro_batches[-1], sizes=sizes)
        warmup.step()
        seconds += time.perf_counter() - start
        last = step.done or i + 1 == recipe.steps
        if last and recipe.router.correct:
            values |= step.correct_routers()
        on_step(Progress(recipe.name, recipe.seed, i + 1, last, values, step))
        if last:
            break
    return step, seconds


def _measure(model: nn.Module, tokenizer: Tokenizer, sets: Sets, asked: Sequence[Metric]) -> dict[str, float]:
    torch.manual_seed(0)  # a metric that draws random numbers gets the same ones for every row
    names = [name for name in asked if isinstance(name, str)]
    known: dict[str, Any] = {side: sets[side] for side in ("forget", "retain", "holdout") if side in sets}
    values = metrics.evaluate(model, tokenizer, **known, only=names)
    for metric in asked:
        if not isinstance(metric, str):
            found = checked(metric(model, tokenizer, sets), f"the metric {_name(metric)}")
            if taken := found.keys() & {*values, "seconds", "routing_drift", "privleak"}:
                raise ValueError(f"the metric {_name(metric)} names {sorted(taken)[0]!r}, which is there already")
            values |= found
    return values


class _Source:
    """Source of a model that gives any number of fresh copies."""

    def __init__(self, what: str, model: Model, tokenizer: Tokenizer | None):
        self.what, self._model, self._tokenizer = what, model, tokenizer
        self._first: nn.Module | None = None  # a copy made for its tokenizer or digest and not returned yet
        self._last: Callable[[], nn.Module | None] = lambda: None
        self._digest: str | None = None
        self._make: Callable[[], object]
        if isinstance(model, nn.Module):
            self._make = lambda: copy.deepcopy(model)
        elif isinstance(model, str | Path):
            loading.located(model)  # which refuses what is no model, before any work
            self._make = lambda: loading.load_model(model)
        elif callable(model):
            self._make = model
        else:
            raise TypeError(f"{what}: expected a model, a folder or a function; got {type(model).__name__}")
        if tokenizer is None and not isinstance(model, nn.Module):
            self._first = self.fresh()
        if self._tokenizer is None:
            raise ValueError(f"{what}: expected a tokenizer too, with a model in memory; got none")

    @property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that was given or came with the model."""
        assert self._tokenizer is not None
        return self._tokenizer

    def fresh(self) -> nn.Module:
        """Return a copy of the model that has not been changed."""
        first, self._first = self._first, None
        if first is not None:
            return first
        made = self._make()
        model, own = made if isinstance(made, tuple) else (made, None)
        if not isinstance(model, nn.Module):
            raise TypeError(f"{self.what}: expected the function to make a model; got {type(model).__name__}")
        if model is self._last():
            raise ValueError(f"{self.what}: the function gave one model twice; each run needs a fresh one")
        self._last, self._tokenizer = weakref.ref(model), self._tokenizer or own
        return model

    def digest(self) -> str:
        """Return a digest of the model's class, config, weights and adapters, and of which weights are frozen."""
        if self._digest is None:
            model = self._model if isinstance(self._model, nn.Module) else self.fresh()
            frozen = sorted(name for name, p in model.named_parameters() if not p.requires_grad)
            self._digest = json.dumps([model_digest(model), *frozen])
            self._first = None if model is self._model else model
        return self._digest


class _Rows:
    """Finished rows in a folder, each in a file named by a hash of all that determines it; without a folder, none."""

    def __init__(
        self, out: str | Path | None, tokenizer: Tokenizer, trained: Sets, sets: Sets, asked: Sequence[Metric]
    ):
        self.folder = None if out is None else Path(out) / _ROWS
        examples = {
            name: {side: [dataclasses.astuple(e) for e in examples] for side, examples in given.items()}
            for name, given in (("trained", trained), ("measured", sets))
        }
        words = None if out is None else sorted(tokenizer.get_vocab().items())
        versions = [__version__, torch.__version__, transformers.__version__]
        self._common = [versions, words, examples, [_identity(metric) for metric in asked]]

    def get(self, run: str, recipe: Recipe | None, source: _Source, make: Callable[[], dict]) -> dict[str, float]:
        if self.folder is None:
            return make()
        settings = None if recipe is None else recipe.to_dict()
        identity = json.dumps([*self._common, run, settings, source.digest()], default=str)
        path = self.folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
        if path.is_file():
            try:
                return Table.from_json(path.read_text(encoding="utf-8")).results[0][run]
            except (ValueError, KeyError) as error:
                warnings.warn(f"{path} is damaged ({error}); the run {run!r} is made again", stacklevel=3)
        values = make()
        write_text(path, Table({0: {run: values}}).to_json() + "\n")
        return values


def _check_kind(name: str, given: object, kind: type, expected: str) -> None:
    """Raise TypeError, which names the argument, for one of another kind."""
    if not isinstance(given, kind):
        raise TypeError(f"{name}: expected {expected}; got {type(given).__name__} {given!r}")


def _recipes(recipes: Sequence[str | Path | Recipe | Mapping]) -> list[Recipe]:
    if isinstance(recipes, str | Path | Recipe | Mapping):
        raise TypeError(f"expected a list of recipes; got one: {recipes!r}")
    _check_kind("recipes", recipes, Iterable, "a list of recipes")
    made = [Recipe.of(recipe) for recipe in recipes]
    names = [recipe.name for recipe in made]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two recipes are named {twice[0]!r}; give one of them another `name`")
    return made


def _metrics(asked: Sequence[Metric] | None, evaluation: Mapping, baselines: Mapping) -> list[Metric]:
    if asked is None:
        return list(NAMES)
    if isinstance(asked, str) or callable(asked):
        raise TypeError(f"expected a list of metrics; got one: {asked!r}")
    _check_kind("metrics", asked, Iterable, "a list of names and functions")
    for metric in asked:
        if not callable(metric) and metric not in NAMES:
            raise ValueError(f"expected metrics among {', '.join(NAMES)}, or functions; got {metric!r}")
    keys = [metric if isinstance(metric, str) else _name(metric) for metric in asked]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"the metric {twice[0]!r} is asked for twice")
    if not asked:
        raise ValueError("expected at least one metric; got none")
    if {"minkauc", "privleak"} & set(keys) and "holdout" not in evaluation:
        raise ValueError("minkauc and privleak need unseen documents: evaluation={'holdout': ...}")
    if "privleak" in keys and RETRAIN not in baselines:
        raise ValueError(f"privleak needs the retrained model: baselines={{{RETRAIN!r}: ...}}")
    return list(asked)


def _encoding(recipes: Sequence[Recipe], given: Sequence[Mapping], max_length: int | None) -> Data:
    """Return the data section by which all rows are encoded, since one table measures every run on the same examples.

    Raises ValueError if two recipes encode rows otherwise, unless all rows are examples already.
    """
    names = ["chat_template", "enable_thinking", "system", "date", "prompt_tokens", "seam"]
    names += ["max_length"] * (max_length is None)
    to_encode = any(not isinstance(item, Example) for sides in given for items in sides.values() for item in items)
    for recipe, name in itertools.product(recipes if to_encode else (), names):
        first, other = getattr(recipes[0].data, name), getattr(recipe.data, name)
        if first != other:
            raise ValueError(
                f"the recipes {recipes[0].name!r} and {recipe.name!r} encode rows otherwise: data.{name} is {first!r} "
                f"and {other!r}; give both the same, give Examples, or make a table of each"
            )
    settings = recipes[0].data if recipes else Data()
    return settings if max_length is None else dataclasses.replace(settings, max_length=max_length)


def _encoded(
    side: str, items: Sequence[Item], *, tokenizer: Tokenizer, settings: Data, alternates: bool
) -> list[Example]:
    made = data.encode_side(items, tokenizer, settings, side=side, alternates=alternates)
    if not carry_loss(made):
        raise ValueError(f"{side}: no example has a token to predict")
    return made


def _name(metric: Callable) -> str:
    return getattr(metric, "__qualname__", type(metric).__qualname__)


def _identity(metric: Metric) -> list[str]:
    if isinstance(metric, str):
        return [metric]
    try:
        text = inspect.getsource(metric if hasattr(metric, "__qualname__") else type(metric))
    except (OSError, TypeError):  # a function defined in an interpreter or in C has no source text
        text = ""
    return [getattr(metric, "__module__", ""), _name(metric), text]
