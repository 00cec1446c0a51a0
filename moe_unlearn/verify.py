"""verify: the first steps of a run beside the plain path, and against it in float64.

    step = UnlearnStep(model, recipe, verify=10)         # True verifies every step
    step(forget_batch, retain_batch)["verify_difference"]
    print(step.verifier.reports[-1])

From the same weights and optimizer state the plain path (`fused=False`) makes the step twice more: in the
model's dtype, the baseline, and in float64, the truth. Losses, gradients (where the fused step has them),
weights and optimizer state must meet the criterion of `testing`. Where a plain comparison would judge rounding
instead of the step:

    routing     a token near a tie goes elsewhere in another precision: the plain runs take the fused step's
                experts, and the report counts how often they had chosen others. A router that does not choose
                by topk is not held to them; a step whose routes then part is reported as not compared.
    losses      one number's error may be small by luck, and so may a factor's that all gradients share: beside
                the baseline's error stand those of float64 runs with each weight off by up to one ulp
    weights     Adam divides by |g|, so that a gradient of rounding noise has an update of any sign: weights
                are held to the formula at the step's own new moments (which are held to the truth), of SGD to
                the truth; all in terms of the change
    rounding    a weight narrower than its arithmetic must be what the same random bits make of a value
                within the error of that arithmetic
    masks       what the mask holds back must keep its bits

Memory while a step is verified: the trained weights and their optimizer state once more, for the way back, and
after the step two copies of the model, one in float64, with dense gradients and optimizer state; at 4 bytes a
weight and all of them trained by AdamW about 12 + 16 + 32 bytes a weight. A step takes about six times as long.

Deterministic. Source: our specification.
"""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moe_unlearn.experts import experts_modules
from moe_unlearn.forward import Batch
from moe_unlearn.losses import decoder_of
from moe_unlearn.ops.bits import philox, round_stochastic, unpack_bits
from moe_unlearn.optim import MaskedAdamW
from moe_unlearn.testing import AccuracyError, assert_as_accurate, ulp

PERTURBATIONS = 2  # float64 runs on weights that are off by rounding
_WORST = 8  # tensors a report names


class VerificationError(ArithmeticError):
    """The fused step is not the plain one; the model and the optimizer are as before the step."""

    def __init__(self, report: "Report", undone: str):
        super().__init__(f"{report}\n{undone}")
        self.report = report


@dataclass
class Report:
    """What verifying one step found; `str(report)` names the worst tensors."""

    step: int
    #: what, e.g. "gradient of NAME" -> max |fused - plain| / max |plain|
    differences: dict[str, float] = field(default_factory=dict)
    #: what does not meet the criterion, and by how much
    problems: list[str] = field(default_factory=list)
    #: tokens times layers, and how many of them the plain paths would have sent to other experts
    routed: int = 0
    rerouted: int = 0
    #: False where routes parted for good; then nothing was judged
    compared: bool = True

    @property
    def largest(self) -> float:
        """The largest relative difference; 0 for a step that was not compared."""
        return max(self.differences.values(), default=0.0) if self.compared else 0.0

    def __str__(self) -> str:
        if not self.compared:
            return f"step {self.step}: not compared: its router sends tokens elsewhere in another precision"
        worst = sorted(self.differences.items(), key=lambda item: -item[1])[:_WORST]
        lines = [
            f"step {self.step}: {'NOT the plain step' if self.problems else 'equals the plain step'} within the "
            f"criterion; largest relative difference {self.largest:.2e} among {len(self.differences)} tensors",
            *(f"  above the criterion: {problem}" for problem in self.problems),
            *(f"  {difference:.2e}  {name}" for name, difference in worst),
            f"  {self.rerouted} of {self.routed} routes were near a tie and taken as the fused step took them",
        ]
        return "\n".join(lines)


@dataclass
class _Run:
    """One way of making the step."""

    losses: list[dict[str, float]]
    gradients: dict[str, Tensor | None]
    updated: set[str]
    weights: dict[str, Tensor]
    state: dict[str, dict]  # of the optimizer, by parameter


class Verifier:
    """Watches an `UnlearnStep` and verifies its first `steps` updates (True: all of them)."""

    def __init__(self, step, steps: int | bool):
        if not isinstance(steps, int) or steps < 0:
            raise ValueError(f"verify must be a number of steps, or True for all of them; got {steps!r}")
        self.step = step
        self.remaining = math.inf if steps is True else int(steps)
        self.reports: list[Report] = []
        #: the limit that the gradient norm was clipped to
        self.clipped_to: float | None = None
        #: the plain step of the last verified one, after its update
        self.plain = None
        self._micro_batches: list[tuple] = []

    @contextlib.contextmanager
    def watch(self, forget: Batch, retain: Batch, sizes: dict[str, int] | None) -> Iterator[None]:
        """Around losses and gradients of one micro-batch; the first of a step keeps the state before it.

        Raises ValueError if the forward pass draws random numbers: the two paths would draw others.
        """
        if not self.remaining:
            yield
            return
        step = self.step
        if not step._micro_batches:
            self._micro_batches, self.clipped_to = [], None
            self._weights = {name: p.detach().clone() for name, p in step._trained()}
            self._optimizer = copy.deepcopy(step.optimizer.state_dict())
            self._routes = _Routes(step.model)
        device = next(step.model.parameters()).device
        before = _random_state(device)
        with self._routes.record(step.model):
            yield
        if not torch.equal(before, _random_state(device)):
            self._undo()
            raise ValueError(
                "expected a forward pass without random numbers to verify; this one drew some (dropout, jitter): "
                "set them to 0 or verify=0"
            )
        autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        self._micro_batches.append((forget, retain, sizes, autocast))

    def check(self) -> dict[str, float]:
        """After an update, while its gradients are still there: the metric `verify_difference`.

        Raises VerificationError, with the weights and the optimizer's state as before the step.
        """
        if not self.remaining or not self._micro_batches:
            return {}
        self.remaining -= 1
        step = self.step
        ours = _result(step)
        self.plain, baseline, routes = self._replay(None)
        _, gold, _ = self._replay(torch.float64)
        others = [self._replay(torch.float64, seed)[1] for seed in range(PERTURBATIONS)]
        report = Report(step.steps + 1, routed=self._routes.count, rerouted=routes.rerouted)
        report.compared = routes.equal(self._routes)
        if report.compared:
            _Comparison(self, report, ours, baseline, gold, others).run()
        self.reports.append(report)
        self._micro_batches = []
        if report.problems:
            self._undo()
            raise VerificationError(report, f"stopped; {step.steps} steps done, weights and optimizer as before this")
        return {"verify_difference": report.largest}

    def summary(self) -> str:
        """The reports of all verified steps."""
        return "\n".join(map(str, self.reports))

    @torch.no_grad()
    def _undo(self) -> None:
        for name, p in self.step.model.named_parameters():
            if name in self._weights:
                p.copy_(self._weights[name])
        self.step.optimizer.load_state_dict(self._optimizer)
        self.step.discard()

    def _replay(self, dtype: torch.dtype | None, perturb: int | None = None):
        """The plain step from the state before, its result, and the routes it took."""
        step = self.step
        model = copy.deepcopy(step.model).to(dtype)
        if getattr(model, "is_gradient_checkpointing", False):
            model.gradient_checkpointing_disable()
        with torch.no_grad():
            generator = torch.Generator().manual_seed(perturb or 0)
            for (name, p), source in zip(model.named_parameters(), step.model.parameters(), strict=True):
                p.copy_(self._weights.get(name, source))
                if perturb is not None:
                    off = 2 * torch.rand(p.shape, generator=generator, dtype=p.dtype) - 1
                    p.mul_(1 + torch.finfo(source.dtype).eps * off.to(p.device))
        recipe = dataclasses.replace(step.recipe, retain_budget=None)
        twin = type(step)(model, recipe, _twin_optimizer(step, model), fused=False)
        prepared, optimizer = step.prepared.state_dict(), copy.deepcopy(self._optimizer)
        twin.load_state_dict(
            {"recipe": recipe.to_dict(), "steps": step.steps, "prepared": prepared, "optimizer": optimizer}
        )
        routes = _Routes(model)
        for forget, retain, sizes, (enabled, narrow) in self._micro_batches:
            device = forget["input_ids"].device.type
            with (
                torch.autocast(device, narrow, enabled=enabled and dtype is None),
                routes.record(model, self._routes, wide=dtype is not None),
            ):
                twin.accumulate(forget, retain, sizes=sizes)
        twin.combine()
        twin.clip(self.clipped_to)
        if dtype is not None:
            _take_masters(twin, optimizer)
        twin.optimizer.step()
        return twin, _result(twin), routes


def _result(step) -> _Run:
    named = step._trained()
    return _Run(
        [dict(losses) for losses in step._micro_batches],
        {name: _clone(step._gradients.of(p)) for name, p in named},
        set(step._updated),
        {name: p.detach() for name, p in named},
        {name: step.optimizer.state.get(p, {}) for name, p in named},
    )


class _Comparison:
    """Judges one step; fills its report."""

    def __init__(self, verifier: Verifier, report: Report, ours: _Run, baseline: _Run, gold: _Run, others: list[_Run]):
        self.verifier, self.report = verifier, report
        self.ours, self.baseline, self.gold, self.others = ours, baseline, gold, others

    def run(self) -> None:
        for i, losses in enumerate(self.ours.losses):
            for name, value in losses.items():
                at = f"{name} of micro-batch {i}" if len(self.ours.losses) > 1 else name
                self._judge(at, torch.tensor(value), lambda r, n=name, i=i: torch.tensor(r.losses[i][n]))
        step = self.verifier.step
        for group, p, mask, parameter_id in step.optimizer._parameters():
            name = next((name for name, q in step._trained() if q is p), None)
            if name is not None:
                self._parameter(name, group, p, mask, parameter_id)

    def _parameter(self, name: str, group: dict, p: nn.Parameter, mask: Tensor | None, parameter_id: int) -> None:
        layout = self.verifier.step.optimizer.layout(p)
        slices = slice(None) if layout[0] is None else layout[0]
        kept = torch.ones_like(p, dtype=torch.bool)
        if mask is not None:
            kept = unpack_bits(mask, p.shape[-1] if p.dim() else 1).view(p.shape)
        before, after = self.verifier._weights[name], self.ours.weights[name]
        moved = (before != after) & ~kept
        if moved.any():
            self.report.problems.append(f"weight {name}: {int(moved.sum())} weights moved that the mask holds back")

        def gradient(run: _Run) -> Tensor:
            made = run.gradients[name]
            made = torch.zeros_like(run.weights[name]) if made is None else made
            return torch.where(kept, made, 0)[slices] if made.shape == p.shape else made

        if name not in self.ours.updated:
            self._judge(f"gradient of {name}", gradient(self.ours), gradient)
        ours, plain = self.ours.state[name], self.baseline.state[name]
        count = float(ours.get("step", 0))
        if ours.keys() != plain.keys() or count != float(plain.get("step", 0)):
            self.report.problems.append(
                f"state of {name}: expected {sorted(plain)} at step {float(plain.get('step', 0)):g}; "
                f"got {sorted(ours)} at step {count:g}"
            )
            return
        for key in ours.keys() - {"step", "slices"}:
            if key != "master":
                self._judge(f"{key} of {name}", ours[key], lambda run, key=key: run.state[name][key])
        if not ours:
            if not torch.equal(before, after):
                self.report.problems.append(f"weight {name}: moved, which it does not in the plain step")
            return
        start = self._start(name, p, slices)
        update = _Update(group, parameter_id, p, slices, count)
        truths = [update.truth(run.state[name], start, self.gold.weights[name][slices]) for run in
                  (self.ours, self.baseline)]  # fmt: skip
        truths = [torch.where(kept[slices], truth, start) for truth in truths]
        ends = [run.state[name].get("master", run.weights[name][slices]) for run in (self.ours, self.baseline)]
        self._difference(f"weight {name}", *ends)
        if update.rounds and "master" not in ours:
            wrong = [int(update.off(e, t, start, self._slack(update, gradient)).sum()) for e, t in
                     zip(ends, truths, strict=True)]  # fmt: skip
            if wrong[0] > wrong[1]:
                self.report.problems.append(
                    f"weight {name}: {wrong[0]} of {ends[0].numel()} weights are not the rounding of their update"
                )
            return
        changes = [end.double() - start for end in ends]
        truth = truths[0] - start
        dtype = torch.promote_types(p.dtype, torch.float32)
        self._assert(
            f"weight {name}", changes[0].to(dtype), (truth + changes[1] - (truths[1] - start)).to(dtype), truth
        )
        if "master" in ours and not torch.equal(after[slices], torch.where(
            kept[slices], ends[0].to(p.dtype), before[slices]
        )):  # fmt: skip
            self.report.problems.append(f"weight {name}: is not the rounding of its master weights")

    def _start(self, name: str, p: nn.Parameter, slices) -> Tensor:
        """The weights before, float64: the masters where there are any."""
        verifier = self.verifier
        masters = _by_parameter(verifier.step.optimizer, verifier._optimizer["state"]).get(p, {})
        return masters.get("master", verifier._weights[name][slices]).double()

    def _slack(self, update: "_Update", gradient: Callable[[_Run], Tensor]) -> Tensor | float:
        """What the error of an update without moments may be that its gradient's causes."""
        if update.own_moments:
            return 0.0
        errors = [(gradient(run).double() - gradient(self.gold)).abs() for run in (self.baseline, *self.others)]
        return 2 * update.sensitivity * torch.stack(errors).amax() if errors[0].numel() else 0.0

    def _judge(self, name: str, ours: Tensor, of: Callable[[_Run], Tensor]) -> None:
        plain, gold = of(self.baseline), of(self.gold)
        self._difference(name, ours, plain)
        gold = gold.double()
        errors = [of(run).double() - gold for run in (self.baseline, *self.others)]
        allowed = torch.stack(errors).square().sum(0).sqrt()
        self._assert(name, ours, (gold + allowed).to(ours.dtype), gold)

    def _difference(self, name: str, ours: Tensor, plain: Tensor) -> None:
        if ours.numel():
            scale = float(plain.double().abs().max())
            difference = float((ours.double() - plain.double()).abs().max())
            self.report.differences[name] = difference / scale if scale else float(difference > 0)

    def _assert(self, name: str, ours: Tensor, baseline: Tensor, gold: Tensor) -> None:
        try:
            assert_as_accurate(ours, baseline, gold, name=name)
        except AccuracyError as error:
            self.report.problems.append(str(error))


class _Update:
    """One parameter's update in float64, for the slices that train."""

    def __init__(self, group: dict, parameter_id: int, p: nn.Parameter, slices, count: float):
        self.group, self.parameter_id, self.p, self.slices, self.count = group, parameter_id, p, slices, count
        self.adam = "betas" in group
        self.own_moments = self.adam or (group["momentum"] > 0 and not group["nesterov"])
        self.sensitivity = group["lr"] * (1 + group.get("momentum", 0.0))
        narrow = torch.finfo(p.dtype).bits < 32
        self.rounds = narrow and group["numerics"] in ("nearest", "stochastic")

    def truth(self, state: dict, start: Tensor, gold: Tensor) -> Tensor:
        """The new weights, from the new moments where these determine them, else `gold`."""
        group = self.group
        if self.adam:
            first, second = (state[key].double() for key in ("exp_avg", "exp_avg_sq"))
            corrections = [1 - beta**self.count for beta in group["betas"]]
            decayed = start * (1 - group["lr"] * group["weight_decay"])
            return decayed - group["lr"] / corrections[0] * first / (
                second.sqrt() / math.sqrt(corrections[1]) + group["eps"]
            )
        return start - group["lr"] * state["momentum_buffer"].double() if self.own_moments else gold

    def off(self, end: Tensor, truth: Tensor, start: Tensor, slack: Tensor | float) -> Tensor:
        """bool: the weights that no value within the arithmetic's error of `truth` rounds to."""
        slack = slack + 2 * ulp(torch.maximum(truth.abs(), start.abs()), torch.float32)
        # a weight the mask holds back has nothing to round
        slack = torch.where(truth == start, 0.0, slack)
        low, high = (self._rounded((truth + sign * slack).float()).float() for sign in (-1, 1))
        return (end.float() < low) | (end.float() > high)

    def _rounded(self, value: Tensor) -> Tensor:
        if self.group["numerics"] != "stochastic" or self.p.dtype != torch.bfloat16:
            return value.to(self.p.dtype)
        index = torch.arange(self.p.numel(), device=self.p.device).view(self.p.shape)[self.slices]
        random = philox(index, int(self.count), self.group["seed"], self.parameter_id)
        return round_stochastic(value, random)


class _Routes:
    """The experts that attended tokens visit, layer by layer in the order of the forward passes.

    All ways of making a step see the rows in one order, however they stack and pad them.
    """

    def __init__(self, model: nn.Module):
        self.layers = {name: [] for name in experts_modules(model)}
        self.rerouted = 0

    @property
    def count(self) -> int:
        return sum(len(index) for parts in self.layers.values() for index in parts)

    def equal(self, other: "_Routes") -> bool:
        """Whether every token went to the same experts."""
        pairs = zip(self.layers.values(), other.layers.values(), strict=True)
        return all(
            torch.equal(*(torch.cat(parts).sort(1).values for parts in pair)) if all(pair) else not any(pair)
            for pair in pairs
        )

    @contextlib.contextmanager
    def record(self, model: nn.Module, forced: "_Routes | None" = None, *, wide: bool = False) -> Iterator[None]:
        """Record the forward passes inside; `forced` are routes to take, `wide` computes all in float64."""
        mode = _Mode(self, forced, wide)

        def decoder(module, args, keywords):
            # a gradient checkpoint's recompute is part of a backward pass and runs no decoder
            mode.attended, mode.layer = keywords["attention_mask"].bool().flatten(), 0

        def leave(*_):
            mode.attended = None

        def experts(name, module, args, keywords):
            if mode.attended is not None:
                index = keywords["top_k_index"] if "top_k_index" in keywords else args[1]
                self.layers[name].append(index.detach()[mode.attended])
                mode.layer += 1

        own = decoder_of(model)
        handles = [
            own.register_forward_pre_hook(decoder, with_kwargs=True),
            own.register_forward_hook(leave, always_call=True),
            *(
                module.register_forward_pre_hook(lambda m, a, k, name=name: experts(name, m, a, k), with_kwargs=True)
                for name, module in experts_modules(model).items()
            ),
        ]
        try:
            with mode if forced is not None else contextlib.nullcontext():
                yield
        finally:
            for handle in handles:
                handle.remove()


class _Mode(TorchFunctionMode):
    """Within a decoder: topk takes the forced routes, and float32 asked for by name becomes float64."""

    def __init__(self, routes: _Routes, forced: _Routes | None, wide: bool):
        self.routes, self.forced, self.wide = routes, forced, wide
        self.attended: Tensor | None = None
        self.layer = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.attended is None:
            return function(*args, **kwargs)
        if self.wide:
            # transformers computes norms, softmaxes and routers in float32 whatever the model's dtype
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {key: torch.float64 if v is torch.float32 else v for key, v in kwargs.items()}
            if function is torch.Tensor.float:
                function = torch.Tensor.double
        result = function(*args, **kwargs)
        if function in (torch.topk, torch.Tensor.topk):
            return self._forced(args[0] if args else kwargs["input"], result)
        return result

    def _forced(self, scores: Tensor, result):
        names = list(self.routes.layers)
        if self.layer >= len(names):
            return result
        known = self.forced.layers[names[self.layer]]
        start = sum(len(index) for index in self.routes.layers[names[self.layer]])
        index = torch.cat(known)[start : start + int(self.attended.sum())] if known else None
        if index is None or result.indices.shape != (len(self.attended), index.shape[1]):
            return result
        own = result.indices.clone()
        self.routes.rerouted += int((own[self.attended].sort(1).values != index.sort(1).values).any(1).sum())
        own[self.attended] = index.to(own.dtype)
        return torch.return_types.topk((scores.gather(-1, own), own))


def _twin_optimizer(step, model: nn.Module):
    """The step's optimizer over the parameters of a copy of its model."""
    twins = dict(zip(step.model.parameters(), model.parameters(), strict=True))
    groups = [{**group, "params": [twins[p] for p in group["params"]]} for group in step.optimizer.param_groups]
    return type(step.optimizer)(groups)


@torch.no_grad()
def _take_masters(step, saved: dict) -> None:
    """Masters, which a float64 model has none of, become its weights once the gradient is made from the rounded."""
    for p, state in _by_parameter(step.optimizer, saved["state"]).items():
        own = step.optimizer.state[p]
        if "master" in state:
            p[own["slices"] if "slices" in own else slice(None)] = state["master"].to(p.dtype)
            del own["master"]


def _by_parameter(optimizer, state: dict) -> dict:
    return {p: state[i] for _, p, _, i in optimizer._parameters() if i in state}


def _clone(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.detach().clone()


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
