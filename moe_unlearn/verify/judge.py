"""Comparison of a step with the plain one: the criterion of `testing`, applied to everything that a step computes.

`verifier` explains what is compared with what, and why weights are not simply compared with weights. Source: our
specification; Adam's formula is that of `ops.masked_update`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_unlearn.ops.bits import philox, round_stochastic, unpack_bits
from moe_unlearn.optim import Slot
from moe_unlearn.testing import AccuracyError, assert_as_accurate, ulp
from moe_unlearn.testing.yardstick import Baseline
from moe_unlearn.view import StepView

_WORST = 8  # the number of tensors that a report names


@dataclass
class Report:
    """Result of verifying one step; `str(report)` names the worst tensors."""

    step: int
    #: name of a tensor, e.g. "gradient of NAME" -> max |fused - plain| / max |plain|
    differences: dict[str, float] = field(default_factory=dict)
    #: descriptions of what does not meet the criterion, and by how much
    problems: list[str] = field(default_factory=list)
    #: tokens times layers, and how many of them the plain path would have sent to other experts
    routed: int = 0
    rerouted: int = 0
    #: False where the runs could not be made to take the same routes; then nothing was judged
    compared: bool = True

    @property
    def largest(self) -> float:
        """Return the largest relative difference; 0 for a step that was not compared."""
        return max(self.differences.values(), default=0.0) if self.compared else 0.0

    def __str__(self) -> str:
        if not self.compared and not self.problems:
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
class Run:
    """Results of one way of making the step, by name of the parameter."""

    losses: list[dict[str, float]]
    gradients: dict[str, Tensor | None]
    compact: set[str]  # parameters whose gradients are compact: only the slices that train, with the mask applied
    updated: set[str]  # parameters updated in the backward pass, whose gradients never existed
    weights: dict[str, Tensor]
    state: dict[str, dict]  # the optimizer's state

    @classmethod
    def of(cls, view: StepView) -> "Run":
        """Copy the results of a step after its update, before it is finished."""
        view.optimizer.settle()

        def beside(p: Tensor, held: Tensor) -> Tensor:  # state that lies on the host, but for the count of steps
            return held.to(p.device if held.dim() else held.device, copy=True)

        return cls(
            [dict(losses) for losses in view.losses],
            {name: _clone(view.gradients.made(p)) for name, p in view.trained},
            {name for name, p in view.trained if p in view.gradients.collected},
            set(view.updated),
            {name: p.detach().clone() for name, p in view.trained},
            {name: {k: beside(p, v) for k, v in view.optimizer.state.get(p, {}).items()} for name, p in view.trained},
        )


@dataclass
class Comparison:
    """Judges a step after its update and fills `report`."""

    plain: StepView  # of the plain step
    before: Run  # weights and state before the step
    report: Report
    ours: Run
    baseline: Run  # of the plain step
    gold: Run  # of the plain step in float64
    others: list[Run]  # of float64 steps on weights perturbed by rounding

    def run(self) -> None:
        """Judge losses, gradients, optimizer state and weights."""
        for i, losses in enumerate(self.ours.losses):
            for name, value in losses.items():
                at = f"{name} of micro-batch {i}" if len(self.ours.losses) > 1 else name

                def loss(run: Run, name: str = name, i: int = i) -> Tensor:
                    return torch.tensor(run.losses[i][name], dtype=torch.float64)

                # a loss is a difference of logarithms of order one: however small, it is no closer than their last bit
                last_bit = torch.finfo(torch.float32).eps
                self._judge(at, torch.tensor(value, dtype=torch.float32), loss, last_bit)
        names: dict[Tensor, str] = {p: name for name, p in self.plain.model.named_parameters()}
        # the options are taken from the plain step, whose optimizer was loaded with the state before the step
        for slot in self.plain.optimizer.slots():
            if (name := names[slot.parameter]) in self.ours.weights:
                self._parameter(name, slot)

    def _parameter(self, name: str, slot: Slot) -> None:
        group, p, mask, parameter_id = slot
        layout = self.plain.optimizer.layout(p)
        trained_slices = None if layout is None else layout.trained_slices
        slices = slice(None) if trained_slices is None else trained_slices
        kept = torch.ones_like(p, dtype=torch.bool)
        if mask is not None:
            kept = unpack_bits(mask, p.shape[-1] if p.dim() else 1).view(p.shape)
        before, after = self.before.weights[name], self.ours.weights[name]
        self._require(
            torch.equal(before[~kept], after[~kept]), f"weight {name}: weights moved that the mask holds back"
        )

        def gradient(run: Run) -> Tensor:
            made = run.gradients[name]
            made = torch.zeros_like(run.weights[name]) if made is None else made
            # a compact gradient has its mask applied already
            return made if name in run.compact else torch.where(kept, made, 0)[slices]

        if name not in self.ours.updated:
            self._judge(f"gradient of {name}", gradient(self.ours), gradient)
        ours, plain = self.ours.state[name], self.baseline.state[name]
        count, expected = (float(state.get("step", 0)) for state in (ours, plain))
        if ours.keys() != plain.keys() or count != expected:
            self.report.problems.append(
                f"state of {name}: expected {sorted(plain)} at step {expected:g}; got {sorted(ours)} at step {count:g}"
            )
            return
        for key in sorted(ours.keys() - {"step", "slices", "master"}):
            # second moments are judged by their roots, which scale with the gradient as its errors do
            root: Callable[[Tensor], Tensor] = torch.sqrt if key == "exp_avg_sq" else torch.clone

            def moment(run: Run, key: str = key, root: Callable[[Tensor], Tensor] = root) -> Tensor:
                return root(run.state[name][key])

            self._judge(f"{key} of {name}", root(ours[key]), moment)
        if ours:
            update = _Update(group, parameter_id, p, slices, count)
            self._weight(name, p, update, before[slices], after[slices], kept[slices], gradient)
        else:
            self._require(torch.equal(before, after), f"weight {name}: moved, which it does not in the plain step")

    def _weight(
        self,
        name: str,
        p: Tensor,
        update: "_Update",
        before: Tensor,
        after: Tensor,
        kept: Tensor,
        gradient: Callable[[Run], Tensor],
    ) -> None:
        """Judge the slices of one weight that train, [M, ...] each."""
        start = self.before.state.get(name, {}).get("master", before).double()
        runs, gold = (self.ours, self.baseline), self.gold.weights[name][update.slices]
        slices = update.slices if isinstance(update.slices, Tensor) else None
        truths = [
            self.plain.held(p, torch.where(kept, update.truth(run.state[name], start, gold), start), slices)
            for run in runs
        ]

        def end(run: Run) -> Tensor:
            weights: Tensor = run.state[name].get("master", run.weights[name][update.slices])
            return weights

        ends = [end(run) for run in runs]
        self._difference(f"weight {name}", *ends)
        if update.rounds:
            slack = self._slack(update, gradient)
            wrong = [int(update.off(*pair, start, slack).sum()) for pair in zip(ends, truths, strict=True)]
            problem = f"weight {name}: {wrong[0]} of {kept.numel()} weights are not the rounding of their update"
            self._require(wrong[0] <= wrong[1], problem)
            return
        ours, plain = (end.double() - truth for end, truth in zip(ends, truths, strict=True))
        change, dtype = truths[0] - start, torch.promote_types(p.dtype, torch.float32)
        # the decay factor, the decayed weight and the sum are each rounded, so errors within the last bit are luck
        last_bit = ulp(torch.maximum(truths[1].abs(), start.abs()), dtype)
        plain = torch.maximum(plain.abs(), torch.where(kept, last_bit, 0.0))
        # an update from moments is held to the step's own ones, but the other runs' weights follow from theirs
        others = [] if update.own_moments else self.others
        made = [torch.where(kept, end(run).double() - start, 0.0).to(dtype) for run in others]
        self._assert(f"weight {name}", (change + ours).to(dtype), (change + plain).to(dtype), change, made)
        if "master" in self.ours.state[name]:
            rounded = torch.where(kept, ends[0].to(p.dtype), before)
            self._require(torch.equal(after, rounded), f"weight {name}: is not the rounding of its master weights")

    def _slack(self, update: "_Update", gradient: Callable[[Run], Tensor]) -> Tensor | float:
        """Return the error that an update without moments may have because of the error of its gradient."""
        if update.own_moments:
            return 0.0
        errors = [(gradient(run).double() - gradient(self.gold)).abs() for run in (self.baseline, *self.others)]
        return 2 * update.sensitivity * torch.stack(errors).amax() if errors[0].numel() else 0.0

    def _judge(self, name: str, ours: Tensor, of: Callable[[Run], Tensor], floor: float = 0.0) -> None:
        plain, gold = of(self.baseline), of(self.gold)
        self._difference(name, ours, plain)
        gold = gold.double()
        value = (gold + (plain.double() - gold).abs().clamp_min(floor)).to(ours.dtype)
        self._assert(name, ours, value, gold, [of(run) for run in self.others])

    def _difference(self, name: str, ours: Tensor, plain: Tensor) -> None:
        if ours.numel():
            scale = float(plain.double().abs().max())
            difference = float((ours.double() - plain.double()).abs().max())
            self.report.differences[name] = difference / scale if scale else float(difference > 0)

    def _require(self, holds: bool, problem: str) -> None:
        if not holds:
            self.report.problems.append(problem)

    def _assert(self, name: str, ours: Tensor, value: Tensor, gold: Tensor, others: list[Tensor]) -> None:
        """Compare `ours` with the plain step's `value`; `others` are the values of perturbed runs, if there are any."""
        try:
            baseline = Baseline(value, lambda: torch.stack(others)) if others else value
            assert_as_accurate(ours, baseline, gold, name=name)
        except AccuracyError as error:
            self.report.problems.append(str(error))


class _Update:
    """Update of one parameter in float64, for the slices that train."""

    def __init__(self, group: dict, parameter_id: int, p: Tensor, slices: Tensor | slice, count: float):
        self.group, self.parameter_id, self.p, self.slices, self.count = group, parameter_id, p, slices, count
        self.adam = "betas" in group
        self.own_moments = self.adam or (group["momentum"] > 0 and not group["nesterov"])
        self.sensitivity = group["lr"] * (1 + group.get("momentum", 0.0))
        narrow = torch.finfo(p.dtype).bits < 32
        self.rounds = narrow and group["numerics"] in ("nearest", "stochastic")

    def truth(self, state: dict, start: Tensor, gold: Tensor) -> Tensor:
        """Return the new weights, computed from the new moments where these determine them, else `gold`."""
        group = self.group
        if self.adam:
            first, second = (state[key].double() for key in ("exp_avg", "exp_avg_sq"))
            corrections = [1 - beta**self.count for beta in group["betas"]]
            decayed: Tensor = start * (1 - group["lr"] * group["weight_decay"])
            step: Tensor = (
                group["lr"] / corrections[0] * first / (second.sqrt() / math.sqrt(corrections[1]) + group["eps"])
            )
            return decayed - step
        if not self.own_moments:
            return gold
        step = group["lr"] * state["momentum_buffer"].double()
        return start - step

    def off(self, end: Tensor, truth: Tensor, start: Tensor, slack: Tensor | float) -> Tensor:
        """Return a bool mask of the weights in `end` that are not the rounding of any value close to `truth`.

        A value is close if it lies within the error of the arithmetic.
        """
        slack = slack + 2 * ulp(torch.maximum(truth.abs(), start.abs()), torch.float32)
        # a weight that the mask holds back is not rounded
        slack = torch.where(truth == start, 0.0, slack)
        low, high = (self._rounded((truth + sign * slack).float()).float() for sign in (-1, 1))
        return (end.float() < low) | (end.float() > high)

    def _rounded(self, value: Tensor) -> Tensor:
        if self.group["numerics"] != "stochastic" or self.p.dtype != torch.bfloat16:
            return value.to(self.p.dtype)
        index = torch.arange(self.p.numel(), device=self.p.device).view(self.p.shape)[self.slices]
        random = philox(index, int(self.count), self.group["seed"], self.parameter_id)
        return round_stochastic(value, random)


def _clone(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.detach().clone()
