"""Audit an unlearned model: try to bring the forgotten text back, and say with known error rates whether it did.

The models come one after the other, so that no more of them are in memory than an attack needs: the retrained one
first, for the null of every attack; then the former model, which is asked as it is and then rests in the host's memory;
then the unlearned one, under every attack. What an attack finds is kept by the content of models, documents and
settings (`metrics.results`), so that an audit that was interrupted goes on with the attack that it was in.
"""

import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn import progress
from moe_unlearn.audit import inside, interpolation, plain, prompts, relearning, rounding, routing, verdict
from moe_unlearn.audit.attack import Attack, Outcome, Settings, Sides, Target, reading
from moe_unlearn.audit.documents import Chosen, choose
from moe_unlearn.audit.judge import MARGINS, PLAIN, Evidence, Finding
from moe_unlearn.audit.probe import told_apart
from moe_unlearn.audit.verdict import Share
from moe_unlearn.config import Data
from moe_unlearn.data import Example, encode_rows, pad_token_id
from moe_unlearn.experts import experts_modules
from moe_unlearn.files import make_folder
from moe_unlearn.metrics.results import Evaluation, data_digest
from moe_unlearn.metrics.routing import Routes, routes
from moe_unlearn.metrics.scoring import token_scores
from moe_unlearn.model.saving import has_adapters
from moe_unlearn.prepare.reference import model_digest
from moe_unlearn.ranks import gather, is_first, local

ATTACKS: dict[str, Attack] = {
    own.ATTACK.name: own.ATTACK for own in (plain, rounding, relearning, routing, interpolation, prompts, inside)
}
#: a model, or what makes it when it is needed
Model = nn.Module | Callable[[], nn.Module]


@dataclass(frozen=True)
class Report:
    """Holds what an audit found; `verdict` is that of the worst attack.

    `outcomes` have the scores of every document, `not_tested` what was left out by its name and why, `told_apart` how
    well texts alone tell forget from holdout documents.
    """

    findings: list[Finding]
    outcomes: dict[str, Outcome]
    not_tested: dict[str, str]
    told_apart: Share | None
    documents: dict[str, int]
    left_out: list[str]
    reference: bool
    settings: Settings
    margins: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Return the verdict of the whole: the worst of all findings."""
        return verdict.worst([own.verdict for own in self.findings if own.verdict])

    def of(self, attack: str) -> str:
        """Return the verdict of one attack, "" if it had none."""
        own = [finding.verdict for finding in self.findings if finding.attack == attack and finding.verdict]
        return verdict.worst(own) if own else ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, without the scores of single documents."""
        return {
            "verdict": self.verdict,
            "attacks": {name: self.of(name) for name in self.outcomes},
            "findings": [finding.to_dict() for finding in self.findings],
            "more": {name: outcome.more for name, outcome in self.outcomes.items() if outcome.more},
            "not_tested": self.not_tested,
            "told_apart": None if self.told_apart is None else asdict(self.told_apart),
            "documents": self.documents,
            "left_out": self.left_out,
            "reference": self.reference,
            "settings": asdict(self.settings),
            "margins": self.margins,
            "seconds": self.seconds,
        }


@dataclass(kw_only=True)
class Plan:
    """Says what an audit shall do: which attacks, within which time, where results are kept, and whom it tells."""

    attacks: Sequence[str] = tuple(ATTACKS)
    minutes: float | None = None
    cache_dir: str | Path | None = None
    settings: Settings = field(default_factory=Settings)
    margins: Mapping[str, float] | None = None
    resamples: int = verdict.RESAMPLES
    batch_size: int = 8
    say: Callable[[str], None] | None = None
    _began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if unknown := [name for name in self.attacks if name not in ATTACKS]:
            raise ValueError(f"expected attacks among {', '.join(ATTACKS)}; got {unknown[0]!r}")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"expected a budget above 0 minutes; got {self.minutes:g}")
        # what the model says as it is tells what any attack brings back
        self.attacks = [name for name in ATTACKS if name in self.attacks or name == PLAIN]

    def tell(self, line: str) -> None:
        """Say a line of progress, on one rank, on stderr or as was asked."""
        if is_first():
            (self.say or partial(print, file=sys.stderr))(line)

    def over(self, share: float = 1.0) -> bool:
        """Return whether a share of the time is used up, the same on all ranks."""
        used = self.minutes is not None and time.monotonic() - self._began > 60 * self.minutes * share
        return bool(gather(used)[0])


def audit(
    model: Model,
    tokenizer: Tokenizer,
    *,
    before: Model,
    forget: Iterable,
    retain: Iterable,
    holdout: Iterable,
    reference: Model | None = None,
    out: str | Path | None = None,
    trained: Collection[tuple[int, ...]] = (),
    max_length: int = Data.max_length,
    **plan: Any,
) -> Report:
    """Attack an unlearned model and return what came back; with `out` write the report there too.

    `before` is the model before unlearning, `reference` one that was retrained without the forget documents: models, or
    functions that load them when they are needed. Documents are what `data.encode_rows` takes, texts or examples; those
    of `holdout` were never seen by any of the models, and rows whose tokens are in `trained` are left out of them.
    `plan` has the fields of `Plan`: `attacks`, `minutes`, `cache_dir`, `settings`, `margins`, `resamples`,
    `batch_size`, `say`.

    The models are left bit for bit as they were, but that one which was made here is let go. Raises ValueError for an
    unknown attack, sides without documents, and a `before` of another architecture.
    """
    chosen = Plan(**plan)
    given = {"forget": forget, "retain": retain, "holdout": holdout}
    sides = {side: encode_rows(own, tokenizer, max_length, side=side) for side, own in given.items()}
    rows = choose(sides, trained)
    if isinstance(model, nn.Module) and isinstance(before, nn.Module):
        _check_alike(model, before, "before")
    cache = make_folder(chosen.cache_dir) if chosen.cache_dir is not None else None
    report = _Audit(chosen, tokenizer, rows, cache).made(model, before, reference)
    if out is not None:
        # imported here because drawing is slow to import, and Python callers may want numbers alone
        from moe_unlearn.audit.report import write

        write(Path(out), report)
    return report


class _Audit:
    """The work of one audit, in the order of its models."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer, chosen: Chosen, cache: Path | None):
        self.plan, self.tokenizer, self.chosen, self.cache = plan, tokenizer, chosen, cache
        self.not_tested: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.routes: dict[str, Routes] = {}
        self.reference: Sides | None = None
        self.data = {side: data_digest([row.__dict__ for row in rows]) for side, rows in chosen.rows.items()}

    def made(self, model: Model, before: Model, reference: Model | None) -> Report:
        former = _module(before)
        apart = self._told_apart()
        known = self._known(former)
        if not isinstance(before, nn.Module):
            former = former.to("cpu")
        null = None
        if reference is not None:
            retrained = _module(reference)
            _check_alike(retrained, former, "reference")
            self.reference = {side: self._loglik(retrained, rows) for side, rows in self.chosen.rows.items()}
            # half of the time, since what has no null is of no use
            null = self._attacked("retrained model: ", retrained, former, self.plan.attacks, 0.5)
            del retrained
            asked = known.variants["as it is"].scores
            asked["reference"] = plain.against(asked["loglik"], self.reference)
        after = _module(model)
        _check_alike(after, former, "before")
        wanted = [name for name in self.plan.attacks if null is None or name in null]
        outcomes = self._attacked("", after, former, wanted)
        evidence = Evidence(
            after=outcomes,
            before=known,
            null=null,
            texts_differ=apart is not None and apart.low > 0,
            margins=self.plan.margins,
            resamples=self.plan.resamples,
            seed=self.plan.settings.seed,
        )
        findings = evidence.findings()
        for name in ATTACKS:
            if name not in outcomes:
                self.not_tested.setdefault(name, "it was not asked for")
        return Report(
            findings,
            outcomes,
            self.not_tested,
            apart,
            {side: len(rows) for side, rows in self.chosen.rows.items()},
            self.chosen.left_out,
            reference is not None,
            self.plan.settings,
            MARGINS | dict(self.plan.margins or {}),
            self.seconds,
        )

    def _told_apart(self) -> Share | None:
        try:
            return told_apart(self.chosen.rows["forget"], self.chosen.rows["holdout"], seed=self.plan.settings.seed)
        except ValueError as error:
            self.not_tested["texts alone"] = f"{error}"
            return None

    def _target(self, model: nn.Module, former: nn.Module) -> Target:
        return Target(
            model=model,
            tokenizer=self.tokenizer,
            rows=self.chosen.rows,
            before=former,
            settings=self.plan.settings,
            routes=self.routes,
            reference=self.reference,
            batch_size=self.plan.batch_size,
        )

    def _known(self, former: nn.Module) -> Outcome:
        """Return what the model before shows as it is, of which shares are taken, and keep the routes of its tokens."""
        target, run = self._target(former, former), self._evaluation(former, "before")

        def asked() -> dict[str, Any]:
            self.plan.tell("former model: asked as it is")
            return _result(plain.ATTACK, target)

        known = Outcome.of(run.add(PLAIN, self.data, asked))
        if "inside" in self.plan.attacks:
            lens = run.add("lens", self.data, lambda: {"agg_value": None, "lens": inside.lens_of(target)})
            known.variants["as it is"].scores["lens"] = lens["lens"]
        if "routing" in self.plan.attacks and experts_modules(local(former)):
            pad = target.pad_id
            self.routes = {side: routes(former, rows, pad_id=pad) for side, rows in self.chosen.rows.items()}
        return known

    def _loglik(self, model: nn.Module, rows: Sequence[Example]) -> list[float | None]:
        pad = pad_token_id(self.tokenizer)
        return reading(token_scores(model, rows, batch_size=self.plan.batch_size, pad_id=pad))["loglik"]

    def _evaluation(self, model: nn.Module, what: str) -> Evaluation:
        return Evaluation(f"AUDIT {what}", model, self.tokenizer, asdict(self.plan.settings), cache_dir=self.cache)

    def _attacked(
        self,
        whose: str,
        model: nn.Module,
        former: nn.Module,
        attacks: Sequence[str],
        share: float = 1.0,
    ) -> dict[str, Outcome]:
        """Return the outcome of each attack for which there is time; note in `not_tested` why others have none."""
        run, digest = self._evaluation(model, "attack"), model_digest(former)
        target, found = self._target(model, former), {}
        for name in progress.watched(attacks, f"{whose}audit", "attack"):
            attack = ATTACKS[name]
            if why := attack.why_not(target):
                self.not_tested[name] = why
            elif name != PLAIN and self.plan.over(share):
                self.not_tested[name] = f"the budget of {self.plan.minutes:g} minutes was used up"
            else:
                began = time.monotonic()
                result = run.add(name, [self.data, digest, self.reference], partial(_result, attack, target))
                found[name] = Outcome.of(result)
                self.seconds[f"{whose}{name}"] = round(time.monotonic() - began, 3)
                self.plan.tell(f"{whose}{attack.title.lower()}: {self.seconds[f'{whose}{name}']:.1f} s")
        return found


def _result(attack: Attack, target: Target) -> dict[str, Any]:
    return attack.run(target).to_dict() | {"agg_value": None}


def _module(model: Model) -> nn.Module:
    return model if isinstance(model, nn.Module) else model()


def _check_alike(model: nn.Module, former: nn.Module, what: str) -> None:
    """Raise ValueError unless both have parameters of the same names, shapes and dtypes."""
    ours, theirs = _shapes(model), _shapes(former)
    if different := [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]:
        name = different[0]
        remedy = "; merge the adapter first: merge_and_unload()" if has_adapters(model) or has_adapters(former) else ""
        raise ValueError(
            f"{what}: expected models of one architecture and dtype; {name} is {ours.get(name, 'missing')} in one and "
            f"{theirs.get(name, 'missing')} in the other{remedy}"
        )


def _shapes(model: nn.Module) -> dict[str, str]:
    """Return shapes and dtypes of parameters, tied ones under each of their names: unlearning may have untied them."""
    named = local(model).named_parameters(remove_duplicate=False)
    return {name: f"{list(p.shape)} {str(p.dtype).removeprefix('torch.')}" for name, p in named}
