"""Run `moe-unlearn kernels`: list | record | check | compare | report | accept | selftest.

Cases are ours, and those of installed packages (entry point group `moe_unlearn.kernels`); with `--module FILE.py`
they are those of the file instead. `report` describes the exit codes.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from moe_unlearn import backend
from moe_unlearn.regress import alarms, ours, report, revision, static, verbs
from moe_unlearn.regress import case as registry
from moe_unlearn.regress import selftest as measured
from moe_unlearn.regress.case import Case
from moe_unlearn.regress.fingerprint import fingerprint
from moe_unlearn.regress.report import Result
from moe_unlearn.regress.store import Store, StoreError

CORRECT = 100  # results on which `check` measures its own false alarms, in about a second


def run(options: argparse.Namespace) -> int:
    """Run the chosen verb and return the exit code; raise ValueError for bad input (exit code 2)."""
    try:
        return int(_VERBS[options.kernels_verb](options))
    except (StoreError, static.CorruptLedger) as error:
        print(f"moe-unlearn kernels: corrupt store: {error}", file=sys.stderr)
        return report.CORRUPT


def list_cases(options: argparse.Namespace) -> int:
    """List the cases, their tags, and whether they are recorded."""
    current = Store(options.store).current()
    chosen = _cases(options)
    for case in chosen:
        recorded = current[case.name].content["recorded"] if case.name in current else "not recorded"
        sizes = " ".join(f"{k}={v}" for k, v in case.sizes.items())
        print(f"{case.name:<40} {recorded:<26} {sizes}")
    print(f"{len(chosen)} cases, {sum(case.name in current for case in chosen)} of them recorded in {options.store}")
    return report.FINE


def record(options: argparse.Namespace) -> int:
    """Record what the cases give now; refuse cases that are recorded differently."""
    if options.static:
        if not options.module:
            raise ValueError("record --static expects --module: the ledger of our own kernels ships with the package")
        return _static(options, static.record)
    store = Store(options.store)
    return _finish(
        options, [verbs.record(case, store, seed=options.seed, speed=options.speed) for case in _cases(options)]
    )


def accept(options: argparse.Namespace) -> int:
    """Record what the cases give now as right; keep the former records beneath."""
    if not options.pattern:
        raise ValueError("accept expects the names of the cases, '*' for all of them")
    store = Store(options.store)
    return _finish(
        options, [verbs.accept(case, store, options.reason, speed=options.speed) for case in _cases(options)]
    )


def check(options: argparse.Namespace) -> int:
    """Compare what the cases give now with the records; shrink a failing case to a script."""
    if options.static:
        return _static(options, static.check)
    store, chosen = Store(options.store), _cases(options)
    repros = Path(options.repro) if options.repro else None
    results = [
        verbs.check(case, store, strict=options.strict, speed=options.speed, repros=repros, impl=options.impl)
        for case in chosen
    ]
    if not options.pattern and not options.tag:
        results += verbs.gone(chosen, store)
    code = _finish(options, results)
    print(report.criterion(alarms.measure(CORRECT)), file=_prose(options))
    return code


def compare(options: argparse.Namespace) -> int:
    """Compare B with A in numbers and speed: two implementations, two files, or --base REV and this tree."""
    if options.base is not None:
        return _finish(options, _against_revision(options))
    if len(options.sides) != 2:
        raise ValueError(f"compare expects A and B, or --base REV; got {len(options.sides)} operands")
    base, head = ({case.name: case for case in _side(side, options)} for side in options.sides)
    if set(base) != set(head):
        raise ValueError(f"A and B have different cases: {', '.join(sorted(set(base) ^ set(head))[:5])}")
    results = [
        verbs.compare(base[name], head[name], seed=options.seed, speed=not options.no_speed, strict=options.strict)
        for name in base
    ]
    return _finish(options, results)


def show(options: argparse.Namespace) -> int:
    """Show what the store holds: every record and those it superseded, all of it verified."""
    store = Store(options.store)
    if not store.folder.is_dir():
        raise ValueError(f"there is no store {options.store!r}")
    entries = [
        entry
        for name in sorted(store.current())
        if not options.pattern or registry.matches(name, options.pattern)
        for entry in store.history(name)
    ]
    for entry in entries:
        store.arrays(entry)
    if options.json:
        _write(options.json, report.store_json(entries))
    print(report.store_table(entries, markdown=options.markdown), file=_prose(options))
    return report.FINE


def selftest(options: argparse.Namespace) -> int:
    """Measure the tool itself: seeded numeric bugs found, false alarms, slow-downs found."""
    arguments = [
        f"--comparisons={options.comparisons}",
        *(["--real", f"--seconds={options.real}"] if options.real else []),
    ]
    return measured.main(arguments)


def _cases(options: argparse.Namespace, patterns: Sequence[str] | None = None) -> list[Case]:
    """Register and return the chosen cases; raise ValueError if there are none."""
    patterns = options.pattern if patterns is None else patterns
    if options.impl not in ("auto", *backend.IMPLS):
        raise ValueError(f"--impl must be auto or one of {', '.join(backend.IMPLS)}; got {options.impl!r}")
    if options.module:
        names = {case.name for path in options.module for case in registry.load(path)}
    else:
        ours.register_all(options.impl)
        registry.load_entry_points()
        names = None
    found = [c for c in registry.cases(patterns, tags=options.tag) if names is None or c.name in names]
    if not found:
        raise ValueError(f"no case matches {' '.join([*patterns, *options.tag]) or 'anything'}; see kernels list")
    return [registry.on(case, options.device) for case in found]


def _against_revision(options: argparse.Namespace) -> list[Result]:
    if options.sides:
        raise ValueError(f"compare expects either A and B or --base REV; got both, {' '.join(options.sides)}")
    try:
        return revision.compare(
            options.base,
            modules=options.module,
            patterns=options.case,
            tags=options.tag,
            impl=options.impl,
            device=options.device,
            seed=options.seed,
            speed=not options.no_speed,
            strict=options.strict,
            say=lambda line: print(line, file=sys.stderr),
        )
    except revision.WorkerError as error:
        raise ValueError(str(error)) from error


def _side(side: str, options: argparse.Namespace) -> list[Case]:
    """Return the cases of one operand of compare."""
    if side in ("auto", *backend.IMPLS):
        chosen = argparse.Namespace(**{**vars(options), "impl": side})
    elif side.endswith(".py"):
        chosen = argparse.Namespace(**{**vars(options), "module": [side]})
    else:
        raise ValueError(f"expected auto, {', '.join(backend.IMPLS)} or a file FILE.py; got {side!r}")
    found = _cases(chosen, options.case)
    # unregistered here, because both sides may register the same names
    for case in found:
        registry.forget(case.origin)
    return found


def _static(options: argparse.Namespace, verb: Callable[..., static.Report]) -> int:
    store = Path(options.store)
    ledger = store / static.LEDGER_NAME if options.module else None
    made = verb(options.static, options.pattern, ledger, modules=options.module)
    for line in (*made.problems, *(f"note: {note}" for note in made.notes)):
        print(line, file=_prose(options))
    if options.verbose:
        print(static.table(made.measured), file=_prose(options))
    results = [Result(line.split(":")[0], "static", line) for line in made.problems]
    _files(options, results or [Result(made.summary(), "equal")])
    print(made.summary(), file=_prose(options))
    return made.exit_code


def _finish(options: argparse.Namespace, results: Sequence[Result]) -> int:
    """Print and write the results; return their exit code."""
    print(report.text(results, verbose=options.verbose), file=_prose(options))
    _files(options, results)
    return report.exit_code(results)


def _files(options: argparse.Namespace, results: Sequence[Result]) -> None:
    if options.json:
        _write(options.json, report.to_json(results, fingerprint(options.device or "cpu")))
    if options.junit:
        report.write(Path(options.junit), report.junit(results))


def _write(where: str, content: str) -> None:
    if where == "-":
        print(content)
    else:
        report.write(Path(where), content)


def _prose(options: argparse.Namespace) -> TextIO:
    """Return the stream for text; standard error if standard output carries JSON."""
    return sys.stderr if options.json == "-" else sys.stdout


_VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "list": list_cases,
    "record": record,
    "check": check,
    "compare": compare,
    "accept": accept,
    "report": show,
    "selftest": selftest,
}
