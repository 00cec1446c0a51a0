"""The exactness of the fused step: the cases, and what is checked of one."""

import copy
import random
from collections.abc import Iterator

import torch

from moe_unlearn.ops.bits import unpack_bits
from moe_unlearn.step import UnlearnStep
from moe_unlearn.testing import assert_as_accurate
from tests.support import covers
from tests.support.covers import Case
from tests.support.models import TINY_MODELS
from tests.support.steps import SMALL, VOCAB, changed, data, made_of, recipe, weights

# What the product of the first four is: the full matrix. The others are spread over it.
MATRIX = ("objective", "lever", "optimizer", "family")
AXES = {
    "objective": ("ga", "graddiff", "uce", "npo", "simnpo", "idk_dpo", "kl_min", "rmu"),
    "lever": ("trace", "wagle", "mollm", "all"),
    "optimizer": ("sgd", "adamw"),
    "family": ("olmoe", "qwen3_moe", "gpt_oss"),
    "guard": ("strict", "loss"),
    "dtype": ("float32", "bfloat16"),
    "accumulate": (1, 2),
    "checkpointing": (False, True),
    "clip": (None, 0.5),
    "momentum": (0.0, 0.9),
    "scope": ("all", "experts"),
    "impl": ("auto", "ref"),
}
LEVERS = {
    "trace": ["trace.min_ratio=1.01", "trace.eta=0.3"],
    "wagle": ["wagle.keep=0.5"],
    "mollm": ["mollm.kl_floor=0"],
}
# TRACE weighs retain tokens, which RMU's loss and no loss at all have none of; its experts are a scope
FORBIDDEN = [
    *({"objective": o, "lever": lever} for o in ("ga", "rmu") for lever in ("trace", "all")),
    *({"scope": "experts", "lever": lever} for lever in ("wagle", "mollm")),
    *({"scope": "experts", "objective": o} for o in ("ga", "rmu")),
]


def allowed(case: Case) -> bool:
    """Return whether a case, or a part of one, can be run."""
    return not any(all(case.get(k) == v for k, v in rule.items()) for rule in FORBIDDEN)


def pairwise_cover() -> list[Case]:
    """Return cases in which every two settings that go together do."""
    return covers.pairwise(AXES, allowed)


def full_matrix(seed: int = 0) -> Iterator[Case]:
    """Every case of `MATRIX` in a drawn order, the other axes drawn for each."""
    draw = random.Random(seed)
    cases = list(covers.product({axis: AXES[axis] for axis in MATRIX}, allowed))
    draw.shuffle(cases)
    return (covers.complete(case, AXES, draw, allowed) for case in cases)


def named(case: Case) -> str:
    """A case in a line."""
    on = [axis for axis in ("checkpointing", "clip", "momentum") if case[axis]]
    values = [str(case[axis]) for axis in (*MATRIX, "guard", "dtype", "scope", "impl")]
    return "-".join([*values, f"x{case['accumulate']}", *on])


class Subject:
    """One case, ready to run: everything in it follows from the case and `changes` to the model."""

    def __init__(self, case: Case, **changes):
        self.case = case
        levers = LEVERS if case["lever"] == "all" else [case["lever"]]
        name = "graddiff" if case["objective"] == "uce" else case["objective"]
        overrides = [
            *SMALL.get(name, []),
            *(line for lever in levers for line in LEVERS[lever]),
            f"optimizer.name={case['optimizer']}",
            f"optimizer.momentum={case['momentum']}",
            f"guard={case['guard']}",
            f"accumulate={case['accumulate']}",
            "optimizer.weight_decay=0.1",
            f"optimizer.max_grad_norm={'null' if case['clip'] is None else case['clip']}",
            "forget.gamma=0.5",
        ]
        if case["objective"] == "uce":
            overrides.append("forget.objective=uce")
        if case["objective"] == "rmu" and case["lever"] == "mollm":
            overrides.append("mollm.kl=false")
        if case["scope"] == "experts":
            overrides.append("scope.kind=experts")
        # SGD in bfloat16 moves by less than the last bit otherwise
        self.recipe = recipe(name, *overrides, lr=1e-3 if case["optimizer"] == "adamw" else 1e-2)
        torch.manual_seed(0)
        self.model = TINY_MODELS[case["family"]](vocab_size=VOCAB, **changes).to(getattr(torch, case["dtype"])).eval()
        self.forget, self.retain = data()
        self.prepared = None

    def start(self, *, fused: bool = True, verify: bool = False, dtype: torch.dtype | None = None, off: int = 0):
        """A step over a copy of the model; `off` seeds an error of up to one ulp of each weight."""
        model = copy.deepcopy(self.model).to(dtype)
        step = UnlearnStep(model, self.recipe, fused=fused, verify=verify)
        if self.prepared is None:
            step.prepare(self.forget, self.retain)
            self.prepared = step.state_dict()
        else:
            step.load_state_dict({k: v for k, v in self.prepared.items() if k != "optimizer"})
        if self.case["checkpointing"]:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        if off:
            draw = torch.Generator().manual_seed(off)
            with torch.no_grad():
                for p, own in zip(model.parameters(), self.model.parameters(), strict=True):
                    noise = 2 * torch.rand(p.shape, generator=draw) - 1
                    p.mul_(1 + torch.finfo(own.dtype).eps * noise.to(p.dtype))
        return step

    def make(self, step: UnlearnStep, i: int) -> dict[str, float]:
        """Step `i` of a run."""
        count = self.case["accumulate"]
        chosen = [(i * count + j) % len(self.forget) for j in range(count)]
        return made_of(step, [(self.forget[which], self.retain[which]) for which in chosen])


def check_steps(subject: Subject, steps: int) -> dict[str, float | int]:
    """`steps` verified steps, each from the state of the plain path after the one before.

    Raises VerificationError; AssertionError if a weight that the mask holds back has moved at the end.
    """
    step = subject.start(verify=True)
    before = weights(step.model)
    for i in range(steps):
        subject.make(step, i)
        synchronise(step)
    assert changed(step.model, before), "nothing has moved"
    for name, p in step.model.named_parameters():
        held = name not in dict(step.view().trained)
        if name in step.masks or held:
            kept = torch.zeros_like(p, dtype=torch.bool)
            if not held:
                kept = unpack_bits(step.masks[name], p.shape[-1]).view(p.shape)
            assert torch.equal(p[~kept], before[name][~kept]), f"{name}: held back, but moved"
    reports = step.verifier.reports
    return {
        "steps": len(reports),
        "not_compared": sum(not r.compared for r in reports),
        "largest_difference": max(r.largest for r in reports),
        "routes": sum(r.routed for r in reports),
        "rerouted": sum(r.rerouted for r in reports),
    }


def synchronise(step: UnlearnStep) -> None:
    """Give a verified step the weights and state that the plain path came to."""
    plain = step.verifier.plain
    step.model.load_state_dict(plain.model.state_dict())
    step.optimizer.load_state_dict(copy.deepcopy(plain.optimizer.state_dict()))


def check_free_running(subject: Subject, steps: int) -> None:
    """Fused and plain on their own: losses of every step, and both sets' after the last.

    Rounding grows from step to step: the error allowed is the largest, over the run, of the plain path and of
    two runs that began with weights off by rounding, all against float64. These are made where it would not pass
    without them: they allow more, never less.
    """
    subject.start()
    wide, off = {"fused": False, "dtype": torch.float64}, []
    ours, gold = (torch.stack(_trajectory(subject, way, steps)) for way in ({}, wide))
    for way in ({"fused": False}, {**wide, "off": 1}, {**wide, "off": 2}):
        off.append(torch.stack(_trajectory(subject, way, steps)) - gold)
        try:
            for column, error in enumerate(torch.stack(off).square().sum(0).sqrt().amax(0)):
                truth = gold[:, column]
                assert_as_accurate(ours[:, column].float(), (truth + error).float(), truth, name=f"loss {column}")
            return
        except AssertionError:
            if len(off) == 3:
                raise


def _trajectory(subject: Subject, way: dict, steps: int) -> list[torch.Tensor]:
    step = subject.start(**way)
    rows = []
    for i in range(steps):
        metrics = subject.make(step, i)
        rows.append(torch.tensor([v for k, v in sorted(metrics.items()) if k.endswith("_loss")], dtype=torch.float64))
    with torch.no_grad():
        for forget, retain in zip(subject.forget, subject.retain, strict=True):
            values = step.objectives(forget, retain, joint=False)
            rows.append(torch.stack([values[k].double() for k in sorted(values)]))
    return rows


def check_bits(subject: Subject, steps: int) -> None:
    """A second run has the bits of the first, and so has the next step of a run resumed at any boundary.

    The next step is enough: it ends at a boundary, from which the next resume goes on.
    """
    subject.start()
    step, again = subject.start(), subject.start()
    for i in range(steps):
        saved = copy.deepcopy((step.model.state_dict(), step.state_dict()))
        for run in (step, again):
            subject.make(run, i)
        resumed = subject.start()
        resumed.model.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        subject.make(resumed, i)
        for what, run in (("again", again), (f"resumed at {i}", resumed)):
            assert not changed(run.model, weights(step.model)), what
            _same(step.optimizer.state_dict()["state"], run.optimizer.state_dict()["state"], what)


def _same(one: dict, other: dict, where: str) -> None:
    assert one.keys() == other.keys(), where
    for i, values in one.items():
        assert values.keys() == other[i].keys(), where
        assert all(torch.equal(v, other[i][k]) for k, v in values.items()), where
