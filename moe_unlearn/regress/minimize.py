"""Shrink a failing case to the smallest one that still fails, and write a script that shows it.

The search is deterministic and greedy. Each size by itself goes to its smallest value, else as near to it as halving
the distance finds; then simpler routing is tried; this repeats until nothing shrinks. A smaller case counts if it
fails in the same way (wrong values, or the same type of error). Shrunk cases have no record, so they are compared
with the baseline. A case whose fault shows only against its record keeps its sizes, and its script reads the recorded
arrays.

Source: our specification; shrinking one coordinate after the other follows property-based testing.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from moe_unlearn.files import write_text
from moe_unlearn.regress import numeric, ours
from moe_unlearn.regress.case import Case
from moe_unlearn.testing import AccuracyError

SIMPLEST_FIRST = ("uniform", "one_expert", "first_empty", "last_empty", "half_empty", "skewed", "sentinels")
MOST_TRIES = 200


class Failure(NamedTuple):
    """One way to fail: sizes and routing, and the kind and text of what went wrong."""

    sizes: dict[str, int]
    routing: str
    kind: str
    message: str


def failure(case: Case, seed: int, sizes: Mapping[str, int], routing: str) -> Failure | None:
    """Return how `case` fails against its baseline at these sizes; None if it does not, or cannot be run there."""
    try:
        made = numeric.evaluate(case, seed, routing=routing or None, **sizes)
    except numeric.CaseError:
        return None
    except Exception as error:
        kind = "less accurate" if isinstance(error, AccuracyError) else type(error).__name__
        return Failure(dict(sizes), routing, kind, str(error))
    wrong = [v for v in numeric.judge_all(made.actual, made.baseline, made.gold) if v.level == numeric.INACCURATE]
    return Failure(dict(sizes), routing, "less accurate", wrong[0].message) if wrong else None


def shrink(case: Case, seed: int, *, tries: int = MOST_TRIES) -> Failure | None:
    """Return the smallest failure found; None if the case does not fail against its baseline at its own sizes."""
    left = tries
    first = failure(case, seed, case.sizes, case.routing)
    if first is None:
        return None
    smallest = first

    def attempt(sizes: Mapping[str, int], routing: str) -> bool:
        nonlocal smallest, left
        left -= 1
        found = failure(case, seed, sizes, routing) if left >= 0 else None
        if found is None or found.kind != smallest.kind:
            return False
        smallest = found
        return True

    changed = True
    while changed and left > 0:
        before = smallest.sizes, smallest.routing
        for name in case.sizes:
            _shrink_size(name, case.smallest.get(name, 1), lambda: smallest, attempt)
        # simpler routing may let the sizes shrink further
        order = SIMPLEST_FIRST
        simpler = order[: order.index(smallest.routing)] if smallest.routing in order else ()
        any(attempt(smallest.sizes, routing) for routing in simpler)
        changed = (smallest.sizes, smallest.routing) != before
    return smallest


def _shrink_size(name: str, low: int, current: Callable[[], Failure], attempt: Callable) -> None:
    """Bisect one size between `low` and the size that fails now."""
    while low < current().sizes[name]:
        high = current().sizes[name]
        if attempt({**current().sizes, name: low}, current().routing):
            return
        middle = (low + high) // 2
        if middle == low or not attempt({**current().sizes, name: middle}, current().routing):
            low = max(middle, low + 1)


_SCRIPT = '''"""{title}

{message}

Run with the environment the kernel needs; ends with an error as long as the kernel is wrong.
"""

{imports}
{find}
inputs = case.make({seed}{keywords})
for name, value in inputs.items():
    print(name, value if not hasattr(value, "shape") or value.numel() <= 16 else tuple(value.shape))

made = numeric.evaluate(case, seed={seed}{keywords})
expected = {expected}
for name, actual in made.actual.items():
    if actual.shape == made.gold[name].shape and actual.numel():
        # the element that is farthest from the truth
        i = int((actual.double() - made.gold[name].double()).abs().argmax())
        values = (tensor.flatten()[i].item() for tensor in (actual, expected[name].value, made.gold[name]))
        print("{{}} [{{}}]: got {{!r}}, expected {{!r}}, float64 {{!r}}".format(name, i, *values))
    assert_as_accurate(actual, expected[name], made.gold[name], name=name)
print("not wrong any more")
'''


def script(case: Case, seed: int, found: Failure, impl: str = "auto", arrays: Path | None = None) -> str:
    """Return the source of a stand-alone script; it compares with outputs in the file `arrays`, or the baseline."""
    routing = f", routing={found.routing!r}" if found.routing else ""
    imports = ["from moe_unlearn.regress import numeric", "from moe_unlearn.testing import assert_as_accurate"]
    expected = "made.baseline"
    if case.device is not None:
        imports.insert(0, "import dataclasses\n")
    if arrays is not None:
        imports.insert(0, "from safetensors.torch import load_file\n")
        expected = f"made.measured_by(load_file({str(arrays)!r}))  # as recorded"
    message = re.sub(r'"""|\\', "'", found.message).strip()
    return _SCRIPT.format(
        title=f"{case.name} with seed {seed}: {found.kind}.".replace('"', "'").replace("\\", "/"),
        message=message,
        imports="\n".join(imports),
        find=_finder(case, impl),
        seed=seed,
        expected=expected,
        keywords=routing + "".join(f", {name}={value}" for name, value in found.sizes.items()),
    )


def write(folder: Path, case: Case, text: str) -> Path:
    """Write a script into `folder` under the case's name, replacing an earlier one, and return its path."""
    path = folder / f"repro_{re.sub(r'[^A-Za-z0-9]+', '_', case.name)}.py"
    write_text(path, text)
    return path


def _finder(case: Case, impl: str) -> str:
    """Return lines that define the case in a script."""
    origin, name, device = case.origin, case.name, case.device
    if origin == ours.ORIGIN:
        lines = f"from moe_unlearn.regress import ours\n\nfound = ours.cases({impl!r})"
    elif origin.endswith(".py"):
        lines = f"from moe_unlearn.regress.case import load\n\nfound = load({origin!r})"
    else:
        lines = "from moe_unlearn.regress.case import cases, load_entry_points\n\nload_entry_points()\nfound = cases()"
    lines += f"\n(case,) = [case for case in found if case.name == {name!r}]"
    return lines if device is None else f"{lines}\ncase = dataclasses.replace(case, device={device!r})"
