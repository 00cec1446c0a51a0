"""Make one run of the study: settings, corpus, seed, recipe and control give a dictionary of numbers.

Forgetting is matched: a run is watched every `check_every` steps and ends where VerbMem of the forget set first lies
at or below the retrained model's. Between that check and the one before, every number is interpolated linearly in
VerbMem, so runs are compared at one level of forgetting and not at one number of steps.

A step sees all forget documents and all retain documents that unlearning may see.

"Critical" experts are those that TRACE selects at its default thresholds in the unchanged target model, whatever the
recipe. "Critical tokens" are the tokens of retain documents held out that use one of these experts there.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib import resources
from unittest import mock

import torch
import yaml
from torch import Tensor, nn

from benchmarks import study_domains
from moe_unlearn import data, metrics, mollm, trace, wagle
from moe_unlearn.benchmark import tiny_models
from moe_unlearn.benchmark.tiny_models import Experiment, Settings
from moe_unlearn.config import Recipe, Trace
from moe_unlearn.experts import experts_modules
from moe_unlearn.model.batches import target_mask
from moe_unlearn.model.capture import collect_routing
from moe_unlearn.model.head import token_losses
from moe_unlearn.ops.bits import pack_bits
from moe_unlearn.prepare.preparation import Preparation
from moe_unlearn.prepare.stages import prepare
from moe_unlearn.step import UnlearnStep

VERSION = 1  # to be raised when the code below measures something else under the same name
BATCH = 32
NEAR = 0.1  # the looser level: this far above the retrained model's VerbMem
CRITICAL = {"per_layer": 2, "min_ratio": 1.5}
#: ablations, each of which replaces one of the library's decisions
CONTROLS = ("random-experts", "shuffled-tokens", "sequence-weights", "random-mask", "magnitude-mask", "equal-lambda")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A run, or, without a recipe, a measurement of the two models it starts from.

    `retain` says which retain documents unlearning sees: a "random" share, those that use the critical experts
    "seldom", or those of "another domain" (`study_domains`). Utility is measured on the others.
    """

    settings: Settings
    corpus: str
    seed: int
    retain: str = "random"
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    control: str = ""
    max_steps: int = 120
    check_every: int = 3

    @property
    def key(self) -> str:
        """Return a digest of everything above and of the shipped recipe's content."""
        content = json.dumps([VERSION, asdict(self), _shipped(self.recipe)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def models(self) -> "Spec":
        """Return the measurement of the models that this run starts from."""
        return Spec(settings=self.settings, corpus=self.corpus, seed=self.seed, retain=self.retain)


def run(spec: Spec, models: dict | None = None) -> dict:
    """Measure `spec` and return the numbers; a run needs those of `spec.models`."""
    start = time.process_time()
    made = _prepared(spec.models)
    result = measure_models(made) if spec.recipe is None else _unlearn(spec, made, models)
    return {"spec": asdict(spec), **result, "seconds": time.process_time() - start}


@lru_cache
def _shipped(name: str | None) -> dict | None:
    if name is None:
        return None
    return yaml.safe_load((resources.files("moe_unlearn") / "recipes" / f"{name}.yaml").read_text("utf-8"))


@lru_cache(maxsize=1)
def _prepared(spec: Spec) -> Experiment:
    if spec.retain == study_domains.ANOTHER:
        return study_domains.prepare(spec.corpus, spec.seed, spec.settings)
    made = tiny_models.prepare_experiment(spec.corpus, spec.seed, size=spec.settings)
    if spec.retain == "random":
        return made
    # rank the retain documents by how often their tokens use an expert that is critical against all of them
    selected = _critical(made.target, made.forget, made.retain)
    use = []
    for batch in data.batches(made.retain, BATCH):
        uses, mask = _uses(made.target, batch, selected), target_mask(batch)
        use += ((uses & mask).sum(1) / mask.sum(1).clamp_min(1)).tolist()
    order = sorted(range(len(use)), key=lambda i: (use[i], i))
    ranked, seen = [made.retain[i] for i in order], len(made.retain_unlearn)
    return replace(made, retain_unlearn=ranked[:seen], retain_eval=ranked[seen:])


def measure_models(made: Experiment) -> dict:
    """Measure utility and memory of target and retrained model, mismatch, and the target's gradients of each expert."""
    f, r = (trace.routing_frequencies(made.target, data.batches(s, BATCH)) for s in (made.forget, made.retain_unlearn))
    selected = trace.select_experts(f, r, **CRITICAL, allow_empty=True)
    models = {name: measure(getattr(made, name), made, selected) for name in tiny_models.MODELS}
    auc = models["retrain"]["minkauc"]
    for values in models.values():
        values["privleak"] = metrics.privleak(values["minkauc"], auc)
    ratio = f.frequency / r.frequency.clamp_min(0.5 / r.tokens)
    loaded = f.frequency >= f.frequency.mean(1, keepdim=True)
    retain, prepared = data.batches(made.retain_unlearn, BATCH), Preparation()
    recipe = Recipe(trace=Trace(**CRITICAL, allow_empty=True))
    prepare(made.target, recipe, prepared, data.batches(made.forget, BATCH), retain)
    forget = expert_gradients(made.target, data.batches(made.forget, BATCH))
    uses = [(_uses(made.target, b, selected)[target_mask(b)]) for b in data.batches(made.retain_eval, BATCH)]
    return {
        "models": models,
        "selected": selected.nonzero().tolist(),
        "ratio": ratio[selected].tolist(),
        "largest_ratio": float(ratio[loaded].max()),
        "critical_share": float(torch.cat(uses).double().mean()),
        "forget_gradient": forget[selected].tolist(),
        "forget_gradient_others": float(forget[~selected].mean()),
        **_gradient_norms(made.target, retain, selected, prepared),
    }


def measure(model: nn.Module, made: Experiment, selected: Tensor) -> dict[str, float]:
    """Measure memory of the forget and utility of the retain documents held out; `_c` means critical tokens only."""
    scored = {
        side: metrics.token_scores(model, getattr(made, side), batch_size=BATCH)
        for side in ("forget", "retain_eval", "holdout")
    }
    out = {
        "verbmem_f": metrics.verbmem(model, made.tokenizer, made.forget),
        "nll_f": metrics.nll(scored["forget"]),
        "minkauc": metrics.membership_auc(scored["forget"], scored["holdout"]),
        "verbmem_r": metrics.verbmem(model, made.tokenizer, made.retain_eval),
        "knowmem_r": metrics.knowmem(model, made.tokenizer, made.retain_eval, scores=scored["retain_eval"]),
        "nll_r": metrics.nll(scored["retain_eval"]),
        "nll_h": metrics.nll(scored["holdout"]),
    }
    critical = []
    for batch in data.batches(made.retain_eval, BATCH):
        uses = _uses(made.target, batch, selected)
        for row, index in zip(uses, batch["index"].tolist(), strict=True):
            score = scored["retain_eval"][index]
            critical.append(replace(score, counted=score.counted & row[: len(score.counted)]))
    hits = torch.cat([s.correct[s.counted] for s in critical])
    every = torch.cat([s.correct[s.counted] for s in scored["retain_eval"]])
    out["accuracy_r"] = float(every.double().mean())
    if len(hits):
        out |= {"nll_c": metrics.nll(critical), "accuracy_c": float(hits.double().mean())}
    return out


def expert_gradients(model: nn.Module, batches: list[dict], weights: Tensor | None = None) -> Tensor:
    """Return the norms [L, E], float64, of the mean (weighted) NLL's gradients by each expert's weights.

    `weights` are those of the counted tokens, in the order of `batches`.
    """
    parameters = [list(module.parameters(recurse=False)) for module in experts_modules(model).values()]
    flat = [p for layer in parameters for p in layer]
    masks = [target_mask(batch) for batch in batches]
    total = sum(int(mask.sum()) for mask in masks)
    parts = None if weights is None else weights.split([int(mask.sum()) for mask in masks])
    sums = [torch.zeros_like(p) for p in flat]
    for i, (batch, mask) in enumerate(zip(batches, masks, strict=True)):
        per_token = None
        if parts is not None:
            per_token = torch.zeros(mask.shape)
            per_token[mask] = parts[i].float()
        loss = token_losses(model, batch, token_weights=per_token).sum() / total
        for held, gradient in zip(sums, torch.autograd.grad(loss, flat), strict=True):
            held += gradient
    squares = [g.double().flatten(1).square().sum(1) for g in sums]
    width = len(parameters[0])
    return torch.stack([sum(squares[i : i + width]) for i in range(0, len(squares), width)]).sqrt()


def _unlearn(spec: Spec, made: Experiment, models: dict) -> dict:
    """Make the run itself; return what was reached when, the utility there, and what the levers did."""
    recipe = replace(Recipe.load(spec.recipe, spec.overrides), seed=spec.seed)
    watch = _Watch(made, models)
    torch.manual_seed(spec.seed)
    model = made.fresh_target()
    step = UnlearnStep(model, recipe)
    retain = data.batches(made.retain_unlearn, BATCH)
    whole = [data.batches(side, len(side))[0] for side in (made.forget, made.retain_unlearn)]
    with control(spec):
        step.prepare(data.batches(made.forget, BATCH), retain)
        _change_weights(spec, step, retain)
        watch.previous = _copy(model)
        for i in range(1, spec.max_steps + 1):
            step(*whole)
            if (i % spec.check_every == 0 or i == spec.max_steps) and watch.check(model, i):
                break
    step.close()
    return {
        "matched": watch.matched,
        "trajectory": watch.trajectory,
        "end": watch.end or watch.measure(model),
        **_levers(step, retain),
        **_gradient_norms(model, retain, watch.critical, step.prepared),
    }


class _Watch:
    """Checks a model every few steps, and measures it where its VerbMem crosses a level."""

    def __init__(self, made: Experiment, models: dict):
        target, retrain = (models["models"][name] for name in ("target", "retrain"))
        self.made, self.auc = made, retrain["minkauc"]
        self.critical = _table(models["selected"], made.settings)
        self.levels = {"near": retrain["verbmem_f"] + NEAR, "retrain": retrain["verbmem_f"]}
        self.matched: dict[str, dict | None] = dict.fromkeys(self.levels)
        self.trajectory = [{"step": 0, "verbmem_f": target["verbmem_f"]}]
        self.previous: dict[str, Tensor] = {}  # weights at the check before
        self.end: dict | None = None

    def check(self, model: nn.Module, i: int) -> bool:
        """Check the model at step i and return whether the run is over."""
        model.eval()
        last, now = self.trajectory[-1], metrics.verbmem(model, self.made.tokenizer, self.made.forget)
        self.trajectory.append({"step": i, "verbmem_f": now})
        crossed = [name for name, level in self.levels.items() if self.matched[name] is None and now <= level]
        if crossed:
            there, current = self.measure(model) | {"step": i}, _copy(model)
            model.load_state_dict(self.previous)
            here = self.measure(model) | {"step": last["step"]}
            model.load_state_dict(current)
            for name in crossed:
                share = (last["verbmem_f"] - self.levels[name]) / (last["verbmem_f"] - now)
                self.matched[name] = {k: (1 - share) * here[k] + share * there[k] for k in there}
            self.end = there
        else:
            self.end = None
        self.previous = _copy(model)
        return self.matched["retrain"] is not None

    def measure(self, model: nn.Module) -> dict[str, float]:
        values = measure(model, self.made, self.critical)
        return values | {"privleak": metrics.privleak(values["minkauc"], self.auc)}


def _levers(step: UnlearnStep, retain: list[dict]) -> dict:
    """Return what TRACE chose, what its weights cost, and what WAGLE kept."""
    prepared, found = step.prepared, {}
    if prepared.calibration is not None:
        # SEUF selects after TRACE, so `selected` is its choice
        chosen = prepared.calibration.tilt != 0 if step.recipe.scope.kind == "seuf" else prepared.selected
        f, r = (prepared.frequencies[side].frequency[chosen] for side in ("forget", "retain"))
        found["trace"] = {
            "selected": int(chosen.sum()),
            "ratio": float((f / r.clamp_min(1e-9)).mean()),
            "ess": prepared.calibration.ess / sum(int(target_mask(batch).sum()) for batch in retain),
            "largest_weight": prepared.calibration.largest_weight,
        }
    elif step.recipe.trace is not None:
        found["trace"] = None  # no expert qualified, so the run is one without TRACE
    if prepared.mask is not None:
        found["kept"] = prepared.mask.fraction
    return found


def _gradient_norms(model, retain, critical, prepared) -> dict:
    """Return the mean retain-gradient norms of critical and other experts, without TRACE's weights and with them."""
    if not critical.any():
        return {}
    norms = {"uniform": expert_gradients(model, retain)}
    if prepared.token_weights is not None:
        weights = [prepared.token_weights.get(b)[target_mask(b)] for b in retain]
        norms["weighted"] = expert_gradients(model, retain, torch.cat(weights))
    return {
        "retain_gradient": {
            name: {"critical": float(v[critical].mean()), "others": float(v[~critical].mean())}
            for name, v in norms.items()
        }
    }


@contextlib.contextmanager
def control(spec: Spec) -> Iterator[None]:
    """Replace an ablation's decision for a step that is prepared and run inside.

    Raises ValueError for an unknown control.
    """
    if spec.control and spec.control not in CONTROLS:
        raise ValueError(f"unknown control {spec.control!r}; expected one of {', '.join(CONTROLS)}")
    draw = data.generator(spec.seed, 1)
    select = trace.select_experts

    def random_experts(forget, retain_, **settings):
        selected = select(forget, retain_, **settings)
        order = torch.rand(selected.shape, generator=draw).argsort(1).argsort(1)
        return order < selected.sum(1, keepdim=True)

    def mask(score):
        def mask_of(model, forget_batches, retain_batches, rule, **how):
            scores = {name: score(p.detach()) for name, p in model.named_parameters()}
            values = torch.cat([s.flatten() for s in scores.values()])
            threshold = values.kthvalue(len(values) - int(rule.keep * len(values))).values
            packed = {name: pack_bits(s > threshold) for name, s in scores.items()}
            return wagle.WeightMask({n: tuple(s.shape) for n, s in scores.items()}, packed, rule.keep)

        return mask_of

    replaced = {
        "random-experts": (trace, "select_experts", random_experts),
        "random-mask": (wagle, "mask_of", mask(lambda p: torch.rand(p.shape, generator=draw))),
        "magnitude-mask": (wagle, "mask_of", mask(torch.abs)),
        "equal-lambda": (mollm, "_minimum", lambda cosines, lengths: torch.full_like(lengths, 1 / len(lengths))),
    }
    with mock.patch.object(*replaced[spec.control]) if spec.control in replaced else contextlib.nullcontext():
        yield


def _change_weights(spec: Spec, step: UnlearnStep, retain: list[dict]) -> None:
    """Change the token weights for the two controls that do so.

    One shuffles them among all counted tokens; the other gives each sequence's tokens their mean.
    """
    cache = step.prepared.token_weights
    if spec.control not in ("shuffled-tokens", "sequence-weights") or cache is None:
        return
    masks, weights = [target_mask(b) for b in retain], [cache.get(b) for b in retain]
    if spec.control == "shuffled-tokens":
        values = torch.cat([w[m] for w, m in zip(weights, masks, strict=True)])
        values = values[torch.randperm(len(values), generator=data.generator(spec.seed, 2))]
        for w, m, part in zip(weights, masks, values.split([int(m.sum()) for m in masks]), strict=True):
            w[m] = part
    else:
        weights = [
            m * (w * m).sum(1, keepdim=True) / m.sum(1, keepdim=True) for w, m in zip(weights, masks, strict=True)
        ]
    for batch, values in zip(retain, weights, strict=True):
        cache.put(batch, values)


def _critical(model: nn.Module, forget: list, retain: list) -> Tensor:
    f, r = (trace.routing_frequencies(model, data.batches(s, BATCH)) for s in (forget, retain))
    return trace.select_experts(f, r, **CRITICAL, allow_empty=True)


def _uses(model: nn.Module, batch: dict, selected: Tensor) -> Tensor:
    """Return a bool mask [B, S] of the positions that are routed to one of the `selected` [L, E] experts."""
    index = collect_routing(model, batch)
    hit = torch.stack([chosen[i].any(-1) for chosen, i in zip(selected, index, strict=True)]).any(0)
    return hit.view(batch["input_ids"].shape)


def _table(pairs: list[list[int]], settings: Settings) -> Tensor:
    selected = torch.zeros(settings.layers, settings.experts, dtype=torch.bool)
    for layer, expert in pairs:
        selected[layer, expert] = True
    return selected


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
