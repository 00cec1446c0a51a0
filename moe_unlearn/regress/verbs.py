"""Record, check, accept and compare cases with a store; the command line and pytest share these functions."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_unlearn.regress import defence, minimize, numeric, timing
from moe_unlearn.regress.case import Case, digest, source
from moe_unlearn.regress.fingerprint import fingerprint, mismatch
from moe_unlearn.regress.numeric import ACCURATE, INACCURATE, Evaluation
from moe_unlearn.regress.report import FINE, Result
from moe_unlearn.regress.store import Entry, Store, StoreError, UnwritableError
from moe_unlearn.testing import described

ROUNDS = 7


def record(case: Case, store: Store, *, seed: int = 0, speed: bool = False) -> Result:
    """Add what `case` gives to the store; a case that is recorded differently is refused, never overwritten.

    A kernel that its own reference, in the same dtype, shows to be wrong is not recorded either.
    """
    return _timed(case, lambda: _record(case, store, seed, speed, None))


def accept(case: Case, store: Store, reason: str, *, seed: int | None = None, speed: bool = False) -> Result:
    """Add an entry that supersedes the recorded one, for a reason; the former is kept."""
    if not reason.strip():
        raise ValueError("accept expects a reason for the new values; got none")
    return _timed(case, lambda: _record(case, store, seed, speed, reason))


def _record(case: Case, store: Store, seed: int | None, speed: bool, reason: str | None) -> Result:
    former = store.current().get(case.name)
    if reason is not None and former is None:
        return Result(case.name, "unrecorded", "nothing is recorded that could be superseded; use record")
    if seed is None:
        seed = 0 if former is None else int(former.content["seed"])
    made = numeric.evaluate(case, seed)
    verdicts = tuple(numeric.judge_all(made.actual, made.baseline, made.gold))
    if numeric.worst(verdicts) == INACCURATE:
        hint = "a kernel meant to be less accurate than plain PyTorch names a `baseline` in its case"
        message = f"not recorded, wrong by its own reference ({hint}):\n{_why(verdicts)}"
        return Result(case.name, INACCURATE, message, verdicts)
    content = {
        "case": case.name,
        "origin": _origin_name(case),
        "seed": seed,
        **_definition(case),
        "inputs": made.inputs,
        "outputs": {name: _describe(value, made.gold[name]) for name, value in made.actual.items()},
        "environment": fingerprint(case.device or "cpu"),
        "source": source(case),
        "yardstick": described(),
    }
    if former is not None:
        same = all(former.content[key] == content[key] for key in ("seed", "sizes", "routing", "inputs", "outputs"))
        if same:
            return Result(case.name, "unchanged")
        if reason is None:
            when = former.content["recorded"]
            return Result(case.name, "refused", f"recorded differently on {when}; see check, accept")
    content |= {
        "seconds": timing.measure({"": timed_call(case, seed)}, rounds=ROUNDS)[""] if speed else [],
        "supersedes": former and former.sha256,
        "reason": reason or "",
    }
    store.add(content, made.actual)
    return Result(case.name, "recorded" if reason is None else "accepted", outputs=verdicts)


def check(
    case: Case,
    store: Store,
    *,
    strict: bool = False,
    speed: bool = False,
    repros: Path | None = None,
    impl: str = "auto",
) -> Result:
    """Compare what `case` gives now with its record.

    Args:
        strict: other bits fail, however accurate.
        speed: show the recorded time beside one of now, unless the numbers fail.
        repros: folder for a stand-alone script of the smallest failure; None writes none.
        impl: the implementation of our ops that the script asks for.
    """
    entry = store.current().get(case.name)
    arrays = None if entry is None else store.arrays(entry)
    result = _timed(case, lambda: _check(case, entry, arrays, strict))
    if entry is not None and speed and result.code == FINE:
        result = replace(result, speed=_recorded_speed(case, entry))
    if entry is not None and repros is not None and result.status in (INACCURATE, "failed"):
        result = replace(result, repro=_reproduce(case, entry, store, result, repros, impl))
    return result


def _check(case: Case, entry: Entry | None, arrays: Mapping[str, Tensor] | None, strict: bool) -> Result:
    if entry is None or arrays is None:
        return Result(case.name, "unrecorded", "there is no record of it; use record")
    now, then = _definition(case), entry.content
    changed = [f"{key} {then[key]} -> {value}" for key, value in now.items() if then[key] != value]
    if changed:
        return Result(case.name, "changed", f"the case is another one: {'; '.join(changed)}; use accept")
    made = numeric.evaluate(case, then["seed"])
    if made.inputs != then["inputs"]:
        names = [k for k in {**then["inputs"], **made.inputs} if then["inputs"].get(k) != made.inputs.get(k)]
        fields = mismatch(then["environment"], fingerprint(case.device or "cpu"), informative=True)
        where = "; ".join(fields) or "the same environment, so the case's inputs are made otherwise: use accept"
        return Result(
            case.name, "environment", f"seed {then['seed']} gives other values of {', '.join(names)} ({where})"
        )
    verdicts = tuple(numeric.judge_all(made.actual, made.measured_by(arrays), made.gold))
    level = numeric.worst(verdicts)
    if level == INACCURATE:
        return Result(case.name, INACCURATE, _why(verdicts), verdicts)
    if level == ACCURATE and strict:
        moved = ", ".join(v.output for v in verdicts if v.level == ACCURATE)
        return Result(case.name, "different", f"other bits in {moved}", verdicts)
    return Result(case.name, level, outputs=verdicts)


def compare(base: Case, head: Case, *, seed: int = 0, speed: bool = True, strict: bool = False) -> Result:
    """Compare `head` with `base`, two kernels for one case, in numbers and then in speed.

    The rounds of the two take turns in this process; the speed of a head that is less accurate is suppressed.
    """

    def compared() -> Result:
        one, other = (numeric.evaluate(case, seed) for case in (base, head))
        result = held_against(head.name, one, other, strict=strict)
        if not speed or result.status == "changed":
            return result
        return _with_comparison(result, base, head, seed, result.status != INACCURATE)

    return _timed(head, compared)


def held_against(name: str, base: Evaluation, head: Evaluation, *, strict: bool) -> Result:
    """Compare `head` with `base` in numbers alone."""
    if base.inputs != head.inputs:
        return Result(name, "changed", "the two cases have different inputs")
    verdicts = tuple(numeric.judge_all(head.actual, head.measured_by(base.actual), head.gold))
    level = numeric.worst(verdicts)
    return Result(name, "different" if strict and level == ACCURATE else level, _why(verdicts), verdicts)


def _with_comparison(result: Result, base: Case, head: Case, seed: int, right: bool) -> Result:
    """Return the result with the speed of `head` beside that of `base`; a head that fools the clock fails."""
    tricks = defence.inspect(head.function, lambda copy: head.make(seed + copy)) if right else []
    if tricks:
        message = "its speed is not measured: " + "; ".join(map(str, tricks))
        return replace(result, status="suspicious", message="\n".join(filter(None, (result.message, message))))
    places = fingerprint(base.device or "cpu"), fingerprint(head.device or "cpu")
    found = timing.decide(_pairs(base, head, seed), numerics=right, fingerprints=places)
    speed = str(found)
    if found.ratio is not None and found.ratio.value < 1 / defence.TOO_FAST:
        speed += f"; suspicious, more than {defence.TOO_FAST:g} times as fast"
    slower = found.verdict == "slower" and result.code == FINE
    return replace(result, speed=speed, status="slower" if slower else result.status)


def _pairs(base: Case, head: Case, seed: int) -> Iterator[tuple[float, float]]:
    contenders = {"base": timed_call(base, seed), "head": timed_call(head, seed)}
    for turn in timing.take_turns(contenders, device=head.device or "cpu"):
        yield turn["base"], turn["head"]


def timed_call(case: Case, seed: int) -> Callable[[], object]:
    """Return the timed call: the kernel on rotating inputs, and the backward pass where gradients are compared."""
    upstream: list[Tensor] = []

    def call(**inputs: Any) -> Any:
        result = case.function(**inputs)
        if case.gradients:
            values = result.values() if isinstance(result, Mapping) else result
            values = (result,) if isinstance(result, Tensor) else values
            outputs = [v for v in values if isinstance(v, Tensor) and v.requires_grad]
            if not upstream:
                upstream.extend(torch.randn_like(output) for output in outputs)
            torch.autograd.grad(outputs, [inputs[k] for k in case.gradients], upstream, allow_unused=True)
        return result

    def make(copy: int) -> dict[str, object]:
        inputs: dict[str, Any] = case.make(seed + copy)
        return {k: v.detach().requires_grad_() if k in case.gradients else v for k, v in inputs.items()}

    return timing.rotate(call, make)


def _recorded_speed(case: Case, entry: Entry) -> str:
    recorded, device = entry.content["seconds"], case.device or "cpu"
    if not recorded:
        return "no time is recorded (record --speed)"
    measured = timing.measure({"": timed_call(case, entry.content["seed"])}, rounds=ROUNDS, device=device)[""]
    then, now = statistics.median(recorded), statistics.median(measured)
    fields = mismatch(entry.content["environment"], fingerprint(device))
    relation = f"not comparable, {'; '.join(fields)}" if fields else f"{now / then:.2f} x, of two runs"
    return f"recorded {then * 1e6:.0f} us, now {now * 1e6:.0f} us ({relation})"


def _reproduce(case: Case, entry: Entry, store: Store, result: Result, folder: Path, impl: str) -> str:
    """Return the path of a script that shows the smallest failure like that of `result`, or "" if there is none."""
    if not case.origin:
        return ""
    seed, arrays = entry.content["seed"], None
    found = minimize.shrink(case, seed)
    if found is None:
        if result.status == "failed":
            return ""
        # it is as good as its baseline, so only the record shows the loss
        arrays = store.arrays_path(entry).resolve()
        found = minimize.Failure(dict(case.sizes), case.routing, "less accurate than recorded", result.message)
    return str(minimize.write(folder, case, minimize.script(case, seed, found, impl, arrays)))


def gone(cases: Sequence[Case], store: Store) -> list[Result]:
    """Return results for records whose case is missing from `cases`, of the files and packages that these come from."""
    names, origins = {case.name for case in cases}, {_origin_name(case) for case in cases}
    why = "recorded, but the case is not there any more"
    return [
        Result(name, "gone", why)
        for name, entry in sorted(store.current().items())
        if name not in names and entry.content["origin"] in origins
    ]


def _origin_name(case: Case) -> str:
    """Return what a store calls the file or package of a case, without a path of this machine."""
    return Path(case.origin).name if case.origin.endswith(".py") else case.origin


def _definition(case: Case) -> dict[str, object]:
    return {"sizes": dict(case.sizes), "routing": case.routing}


def _describe(value: Tensor, gold: Tensor) -> dict[str, object]:
    described: dict[str, object] = {
        "dtype": str(value.dtype).removeprefix("torch."),
        "shape": list(value.shape),
        "sha256": digest(value),
    }
    if value.is_floating_point():
        described["rms_error"] = numeric.rms_error(value, gold)
    return described


def _why(verdicts: Sequence[numeric.Verdict]) -> str:
    return "\n".join(v.message for v in verdicts if v.message)


def _timed(case: Case, judge: Callable[[], Result]) -> Result:
    """Return the result with the seconds it took; errors of the case or its kernel become results."""
    start = time.perf_counter()
    try:
        result = judge()
    except (StoreError, UnwritableError):
        raise
    except numeric.CaseError as error:
        result = Result(case.name, "invalid", str(error))
    except Exception as error:
        result = Result(case.name, "failed", f"{type(error).__name__}: {error}")
    return replace(result, seconds=time.perf_counter() - start)
