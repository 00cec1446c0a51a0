"""Seed numeric bugs: wrong versions of kernels, each of which `numeric` must tell from what was recorded.

Half of them break one of our ops, through its arguments or results; half are small everyday kernels. There are also
harmless changes (other orders of the same additions, other but equal formulas), which must not be called wrong. `run`
records each right kernel, judges each wrong one against that record, and counts.

Errors that the criterion allows are not among them: an RMS error below a quarter of a unit in the last place, such as
rounding towards zero in a tensor most of which stays untouched. `--strict` sees that, as it sees every other bit.

Source: our specification; the kinds are those of mutation testing and of the known bugs of MoE kernels.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_unlearn import ops
from moe_unlearn.ops.bits import unpack_bits
from moe_unlearn.regress import numeric, ours
from moe_unlearn.regress.flat import by_keyword
from moe_unlearn.regress.seeded_kernels import CASES, KERNEL_BUGS, KERNEL_CHANGES
from moe_unlearn.testing import yardstick

# turns the kernel it is given into a wrong version
Break = Callable[[Callable], Callable]


class Bug(NamedTuple):
    """A wrong or a harmlessly changed version of the kernel of one case."""

    case: str
    kind: str
    name: str
    change: Break


class Outcome(NamedTuple):
    """Counts of `run`; `missed` and `alarms` name the bugs not found and the harmless changes called wrong."""

    bugs: int
    missed: list[str]
    changes: int
    alarms: list[str]

    @property
    def found(self) -> int:
        return self.bugs - len(self.missed)

    def __str__(self) -> str:
        lines = [
            f"seeded numeric bugs: {self.found} of {self.bugs} found",
            f"harmless changes: {len(self.alarms)} of {self.changes} called wrong",
        ]
        return "\n".join([*lines, *(f"missed: {name}" for name in self.missed), *(f"alarm: {n}" for n in self.alarms)])


def rows(row: Callable) -> Iterator:
    """Yield the outcome as rows of a table: row(check, limit, measured, at_most=..., note=...)."""
    outcome = run()
    note = "; ".join(outcome.missed) or f"{outcome.bugs} bugs"
    yield row("seeded numeric bugs: found", 1.0, outcome.found / outcome.bugs, note=note)
    note, wrong = "; ".join(outcome.alarms) or f"{outcome.changes} changes", len(outcome.alarms) / outcome.changes
    yield row("harmless changes: called wrong", 0.0, wrong, at_most=True, note=note)


def run(bugs: Sequence[Bug] | None = None, changes: Sequence[Bug] | None = None, seed: int = 0) -> Outcome:
    """Judge every bug and every harmless change (default: all of ours) against its right kernel, on one seed."""
    bugs, changes = BUGS if bugs is None else bugs, CHANGES if changes is None else changes
    cases = {case.name: case for case in (*ours.cases(), *CASES)}
    with yardstick.applied():  # as another machine may have recorded them
        right = {name: numeric.evaluate(cases[name], seed) for name in {bug.case for bug in (*bugs, *changes)}}

    def wrong(bug: Bug) -> bool:
        broken = dataclasses.replace(cases[bug.case], function=bug.change(cases[bug.case].function))
        try:
            made = numeric.evaluate(broken, seed)
        except numeric.CaseError:
            raise
        except Exception:
            return True
        verdicts = numeric.judge_all(made.actual, right[bug.case].measured_by(right[bug.case].actual), made.gold)
        return numeric.worst(verdicts) == numeric.INACCURATE

    def title(bug: Bug) -> str:
        return f"{bug.case}: {bug.kind}: {bug.name}"

    missed = [title(bug) for bug in bugs if not wrong(bug)]
    alarms = [title(bug) for bug in changes if wrong(bug)]
    return Outcome(len(bugs), missed, len(changes), alarms)


# ------------------------------------------------------------------------------------------------- ways to break


def _whole(kernel: Callable) -> Callable:
    """Return the function of a partial, without the options that it holds."""
    assert isinstance(kernel, functools.partial)
    return kernel.func


def _argument(name: str, change: Callable[[Any], Any]) -> Break:
    """Return a break that gives the kernel another value of one argument."""
    return lambda kernel: lambda **inputs: kernel(**{**inputs, name: change(inputs[name])})


def _without(name: str) -> Break:
    return lambda kernel: lambda **inputs: kernel(**{k: v for k, v in inputs.items() if k != name})


def _result(change: Callable[[Tensor], Tensor], name: str | None = None) -> Break:
    """Return a break that changes the kernel's result, or the named one of its results."""

    def broken(kernel: Callable) -> Callable:
        def call(**inputs: Any) -> Any:
            made = kernel(**inputs)
            return change(made) if name is None else {**made, name: change(made[name])}

        return call

    return broken


def _gradient(name: str, change: Callable[[Tensor], Tensor]) -> Break:
    """Return a break that changes the gradient of one input, but no value."""

    def broken(kernel: Callable) -> Callable:
        def call(**inputs: Any) -> Any:
            value = inputs[name].view_as(inputs[name])
            if value.requires_grad:
                value.register_hook(change)
            return kernel(**{**inputs, name: value})

        return call

    return broken


def _instead(other: Callable) -> Break:
    """Return a break that puts another function in place of the kernel."""
    return lambda kernel: other


def _put(value: Tensor, index: Any, new: Any) -> Tensor:
    """Return a copy with value[index] = new."""
    copy = value.clone()
    copy[index] = new
    return copy


def _cut_half(gate_up: Tensor) -> Tensor:
    """Return the projection with gate and up exchanged."""
    gate, up = gate_up.chunk(2, 1)
    return torch.cat([up, gate], 1)


def _last_expert_of(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda g: torch.cat([g[:-1], function(g[-1:])])


def _reversed_within(kernel: Callable) -> Callable:
    """Return a kernel that reverses the rows of each expert, like a sort that is not stable."""

    def call(**inputs: Any) -> Any:
        made = kernel(**inputs)
        bounds, rows = made["expert_offsets"].tolist(), made["sorted_rows"]
        parts = [rows[a:b].flip(0) for a, b in zip(bounds, bounds[1:], strict=False)]
        return {**made, "sorted_rows": torch.cat([*parts, rows[bounds[-1] :]])}

    return call


def _clipped(members: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Return weights clipped after a solution without the cap, then normalised: TRACE's classical mistake."""
    made = ops.retain_weights(members, target)
    weights = made.weights.clamp_max(1.5)
    weights = weights / weights.mean()
    achieved = (weights.double()[:, None] * members).mean(0)
    return {"weights": weights.to(target.dtype), "achieved": achieved.to(target.dtype)}


def _gram32(gradients: Sequence[Sequence[Tensor]], masks: Sequence[Tensor | None]) -> Tensor:
    """Return the Gram matrix with products and sums in float32 instead of float64."""
    products = []
    for tensors, mask in zip(zip(*gradients, strict=True), masks, strict=True):
        kept = 1.0 if mask is None else unpack_bits(mask, tensors[0].shape[-1]).float()
        flat = torch.stack([(g.float() * kept).flatten() for g in tensors])
        products.append(flat @ flat.t())
    return functools.reduce(torch.add, products).double()


def _adamw(**change: Any) -> Break:
    """Return a break that calls masked_update's AdamW with another option."""

    def other(
        param: Tensor, grad: Tensor, first: Tensor, second: Tensor, mask: Tensor, slices: Tensor
    ) -> dict[str, Tensor]:
        param, first, second = param.clone(), first.clone(), second.clone()
        options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "step": 3, "seed": 5, "mask": mask} | change
        options |= {"rounding": "nearest"} if param.dtype != torch.bfloat16 else {}
        by_keyword(ops.masked_adamw_)(param, grad, first, second, slices=slices, **options)
        return {"param": param, "exp_avg": first, "exp_avg_sq": second}

    return _instead(other)


def _bugs() -> Iterator[tuple[str, str, str, Break]]:
    mlp, narrow = "expert_mlp/float32/skewed", "expert_mlp/bfloat16/skewed"
    yield mlp, "index", "sorted rows one off", _argument("sorted_rows", lambda r: r.roll(1))
    yield mlp, "off by one", "last routed row left out", _argument("expert_offsets", lambda o: _put(o, -1, o[-1] - 1))
    yield mlp, "dropped expert", "last expert skipped", _argument("expert_offsets", lambda o: _put(o, -1, o[-2]))
    yield mlp, "stride", "gate and up exchanged", _argument("gate_up_proj", _cut_half)
    yield (
        mlp,
        "stride",
        "down read as its transpose",
        _argument("down_proj", lambda w: w.transpose(1, 2).reshape(w.shape)),
    )
    yield mlp, "scale", "routing weights left out", _argument("top_k_weights", torch.ones_like)
    yield mlp, "scale", "routing weights applied twice", _argument("top_k_weights", torch.square)
    yield mlp, "dtype", "inputs rounded to bfloat16", _argument("hidden_states", lambda x: x.bfloat16().float())
    yield mlp, "precision", "output rounded to bfloat16", _result(lambda y: y.bfloat16().float())
    yield narrow, "precision", "output rounded to 5 bits", _result(lambda y: y.to(torch.float8_e4m3fn).to(y.dtype))
    yield mlp, "stale row", "one row is its neighbour's", _result(lambda y: _put(y, 1, y[0]))
    yield mlp, "index", "two rows exchanged", _result(lambda y: y[[1, 0, *range(2, len(y))]])
    yield mlp, "initialisation", "one row never written", _result(lambda y: _put(y, 5, 0))
    yield mlp, "formula", "gelu for silu", lambda kernel: lambda **i: kernel(**i, gate=ops.Gate("gelu"))
    yield mlp, "gradient scale", "of one token halved", _gradient("hidden_states", lambda g: _put(g, 3, g[3] / 2))
    yield mlp, "gradient sign", "of the routing weights", _gradient("top_k_weights", torch.neg)
    yield mlp, "gradient dropped", "of one expert", _gradient("down_proj", _last_expert_of(torch.zeros_like))
    yield (
        narrow,
        "gradient accumulation",
        "of the gate in 4 bits",
        _gradient("gate_up_proj", lambda g: g.to(torch.float8_e5m2).to(g.dtype)),
    )
    yield (
        "expert_mlp/float32/gpt_oss",
        "formula",
        "no clamp",
        lambda kernel: lambda **i: kernel(**i, gate=ops.Gate("silu", 1.702, shift=1.0)),
    )

    yield "token_loss/nll/float32", "off by one", "labels shifted", _argument("labels", lambda y: y.roll(1))
    yield "token_loss/nll/float32", "mask", "ignored labels count", _argument("labels", lambda y: y.clamp_min(0))
    yield (
        "token_loss/nll/float32",
        "mask",
        "last column left out of the normaliser",
        _argument("bias", lambda b: _put(b, -1, -1e4)),
    )
    yield "token_loss/nll/bfloat16", "scale", "a weight left out", _argument("token_weights", lambda w: _put(w, 0, 1))
    yield (
        "token_loss/uce/float32",
        "formula",
        "nll for uce",
        lambda kernel: lambda **i: _whole(kernel)(by_keyword(ops.token_loss), **i, kind="nll"),
    )
    yield "token_loss/kl/float32", "sign", "of the bias gradient", _gradient("bias", torch.neg)
    yield "token_loss/nll/float32", "accumulation", "losses kept in bfloat16", _result(lambda y: y.bfloat16().float())

    yield "route/skewed", "order", "sort not stable", _reversed_within
    yield "route/skewed", "mask", "tokens of no group counted", _argument("group", lambda g: g.clamp_min(0))
    yield "route/skewed", "off by one", "inclusive offsets", _result(lambda o: o.roll(-1), "expert_offsets")
    yield "route/skewed", "accumulation", "log weights overwritten", _argument("log_weight", torch.zeros_like)
    yield (
        "route/sentinels",
        "mask",
        "sentinels sent to expert 0",
        _argument("top_k_index", lambda i: torch.where(i > 7, 0, i)),
    )

    yield "expert_wgrad/store/float32", "index", "rows one off", _argument("input_rows", lambda r: r.roll(1))
    yield (
        "expert_wgrad/store/float32",
        "off by one",
        "first row left out",
        _argument("expert_offsets", lambda o: _put(o, 0, 1)),
    )
    yield "expert_wgrad/masked/float32", "mask", "not applied", _without("mask")
    yield "expert_wgrad/masked/bfloat16", "mask", "bits one off", _argument("mask", lambda m: m << 1)
    yield (
        "expert_wgrad/masked/float32",
        "initialisation",
        "empty expert not zeroed",
        _result(lambda w: w + (w == 0) * 1e-30),
    )
    yield (
        "expert_wgrad/adamw/float32",
        "dropped expert",
        "last trained expert skipped",
        _result(lambda w: _put(w, 0, w[1]), "exp_avg"),
    )

    yield "gram/masked/float32", "mask", "not applied", _argument("masks", lambda masks: [None, None])
    yield "gram/masked/float32", "accumulation", "in float32", _instead(_gram32)
    yield (
        "gram/factors/bfloat16",
        "off by one",
        "last row left out",
        _argument("expert_offsets", lambda o: _put(o, -1, o[-1] - 1)),
    )
    yield "retain_weights/capped", "formula", "clipped and normalised", _instead(_clipped)
    yield "retain_weights/free", "scale", "mean over T - 1", _result(lambda w: w * len(w) / (len(w) - 1), "weights")
    yield "weight_score/float32", "off by one", "histogram one bin off", _result(lambda h: h.roll(1), "high")
    yield "weight_score/float32", "sign", "of the retain gradient", _argument("grad_retain", torch.neg)
    yield "weight_score/bfloat16", "mask", "bits one off", _result(lambda m: m << 1, "words")

    yield "masked_update/adamw/float32/nearest", "off by one", "step counted late", _adamw(step=2)
    yield "masked_update/adamw/float32/nearest", "mask", "not applied", _adamw(mask=None)
    yield "masked_update/adamw/float32/nearest", "scale", "eps times ten", _adamw(eps=1e-3)
    yield "masked_update/adamw/float32/nearest", "formula", "no weight decay", _adamw(weight_decay=0.0)
    yield (
        "masked_update/sgd/float32/nearest",
        "initialisation",
        "momentum forgotten",
        _argument("first", torch.zeros_like),
    )


def _changes() -> Iterator[tuple[str, str, str, Break]]:
    def permuted(hidden_states: Tensor, gate_up_proj: Tensor, **rest: Any) -> Any:
        order = torch.arange(hidden_states.shape[1] - 1, -1, -1)
        layer = by_keyword(ops.expert_mlp)
        made = layer(hidden_states[:, order], gate_up_proj=gate_up_proj[:, :, order], **rest_down(rest, order))
        return made[:, order]

    def rest_down(rest: dict[str, Any], order: Tensor) -> dict[str, Any]:
        return {**rest, "down_proj": rest["down_proj"][:, order]}

    for case in ("expert_mlp/float32/skewed", "expert_mlp/float32/uniform", "expert_mlp/bfloat16/skewed"):
        yield case, "order", "hidden dimension reversed", _instead(permuted)
    yield (
        "retain_weights/free",
        "implementation",
        "ref",
        lambda kernel: lambda **i: _whole(kernel)(**i, cap=None, impl="ref"),
    )


BUGS = [Bug(*bug) for bug in (*_bugs(), *KERNEL_BUGS)]
CHANGES = [Bug(*change) for change in (*_changes(), *KERNEL_CHANGES)]
