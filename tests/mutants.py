"""Mutants of the Triton kernels: small wrong versions of them, each of which some test must notice.

Every `@triton.jit` function of `triton_kernels/` is mutated mechanically, one edit at a time (`MUTATIONS`). A seed
draws PER_FILE of them per file, evenly over the kinds of edit. Each runs in a forked child on a copy of the
package: the op's quick tests, then its memory and overflow cases, then its whole test file, up to the first
failure. A mutant that changes nothing stands in `tests/equivalent_mutants.py`, with the reason.

    python -m tests.mutants                        all, recorded in benchmarks/results/mutants.json
    python -m tests.mutants --again                the recorded survivors, after a test was added
    python -m tests.mutants --sample 10 --seed 7   ten of them
    python -m tests.mutants --only gram --list     those of one file, not run
"""

import argparse
import ast
import contextlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.equivalent_mutants import EQUIVALENT

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "triton_kernels"
TESTS = ROOT / "tests" / "triton_kernels"
RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"
PER_FILE = 5
COMPARED = {"expert_wgrad", "route", "weight_score"}  # their memory cases compare with the reference, bit for bit
TEST_SECONDS = 90  # of one test


class Mutant(NamedTuple):
    """One edit: the characters [start, stop) of a file become `text`."""

    file: str
    kernel: str
    kind: str
    start: int
    stop: int
    text: str
    line: int

    def apply(self, source: str) -> str:
        return source[: self.start] + self.text + source[self.stop :]

    def diff(self, source: str) -> tuple[str, str]:
        """The changed lines before and after, without indentation; what identifies the mutant."""
        first = source.rfind("\n", 0, self.start) + 1
        last = source.find("\n", self.stop)
        changed = source[first : self.start] + self.text + source[self.stop : last]
        return tuple(" ".join(text.split()) for text in (source[first:last], changed))


# ------------------------------------------------------------------------------------------------------ edits

# node -> (kind, node to replace, new text); `show` gives the source text of a node
Edit = tuple[str, ast.AST, str]
_COMPARISONS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "=="}
_CALLS = {"tl.minimum": "tl.maximum", "tl.maximum": "tl.minimum", "tl.max": "tl.min", "tl.min": "tl.max",
          "tl.sum": "tl.max", "tl.cdiv": "tl.minimum"}  # fmt: skip
_MEMORY = ("tl.load", "tl.store")
_HINTS = {"cache_modifier", "eviction_policy", "num_stages", "axis", "input_precision", "dtype", "volatile"}


def _operand(node, show) -> str:
    """Its text, in parentheses where they might have stood."""
    atoms = ast.Name, ast.Constant, ast.Call, ast.Attribute, ast.Subscript
    return show(node) if isinstance(node, atoms) else f"({show(node)})"


def _comparison(node, show) -> Iterator[Edit]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARISONS:
        new = _COMPARISONS[type(node.ops[0])]
        yield "comparison", node, f"{_operand(node.left, show)} {new} {_operand(node.comparators[0], show)}"


def _arithmetic(node, show) -> Iterator[Edit]:
    if not isinstance(node, ast.BinOp):
        return
    left, right = _operand(node.left, show), _operand(node.right, show)
    if isinstance(node.op, (ast.Add, ast.Sub)):
        yield "sign", node, f"{left} {'-' if isinstance(node.op, ast.Add) else '+'} {right}"
    if isinstance(node.op, ast.Add):
        yield "term dropped", node, left
    if isinstance(node.op, ast.Mult):
        yield "factor dropped", node, left
    if isinstance(node.op, ast.BitAnd) and _is_mask(node):
        yield "mask term dropped", node, left
        yield "mask term dropped", node, right


def _is_mask(node: ast.BinOp) -> bool:
    return not any(isinstance(side, ast.Constant) for side in (node.left, node.right))


def _negation(node, show) -> Iterator[Edit]:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        yield "negation dropped", node, _operand(node.operand, show)
    if isinstance(node, ast.If):
        yield "condition negated", node.test, f"not ({show(node.test)})"


def _constant(node, show) -> Iterator[Edit]:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        yield "constant", node, {0: "1", 1: "0"}.get(node.value, f"({show(node)} + 1)")


def _call(node, show) -> Iterator[Edit]:
    if not isinstance(node, ast.Call):
        return
    name, arguments = show(node.func), node.args
    if name in _CALLS:
        yield "other function", node.func, _CALLS[name]
    if name in _MEMORY:
        yield "index off by one", arguments[0], f"{_operand(arguments[0], show)} + 1"
        for keyword in node.keywords:
            if keyword.arg == "mask":
                yield "mask dropped", keyword.value, f"{_operand(keyword.value, show)} | True"
            if keyword.arg == "other":
                yield "other value", keyword.value, f"({show(keyword.value)} + 1)"
    if name in ("tl.zeros", "tl.full"):
        yield "initial value", node, f"({show(node)} + 1)"
    if name == "tl.where":
        condition, yes, no = map(show, arguments)
        yield "branches swapped", node, f"tl.where({condition}, {no}, {yes})"
    if name in ("range", "tl.range") and arguments:
        first, stop = (0, arguments[0]) if len(arguments) == 1 else (arguments[0], arguments[1])
        yield "last round dropped", stop, f"{_operand(stop, show)} - 1"
        if first:
            yield "first round dropped", first, f"{_operand(first, show)} + 1"
    if name in ("dot", "tl.dot") and len(arguments) > 2:
        yield "accumulate dropped", arguments[2], f"{_operand(arguments[2], show)} * 0"
    if isinstance(node.func, ast.Attribute) and node.func.attr == "to" and not node.keywords:
        yield "cast dropped", node, _operand(node.func.value, show)


def _assignment(node, show) -> Iterator[Edit]:
    if isinstance(node, ast.AugAssign):
        yield "accumulate dropped", node, f"{show(node.target)} = {show(node.value)}"


MUTATIONS: tuple[Callable[..., Iterator[Edit]], ...] = (
    _comparison, _arithmetic, _negation, _constant, _call, _assignment,
)  # fmt: skip


def _strides(function: ast.FunctionDef, show) -> Iterator[Edit]:
    """Each use of a stride replaced by the next stride of the same kernel."""
    names = [a.arg for a in function.args.args if "stride" in a.arg]
    for node in _body(function):
        if isinstance(node, ast.Name) and node.id in names and len(names) > 1:
            yield "stride swapped", node, names[(names.index(node.id) + 1) % len(names)]


def _body(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """The nodes that are executed in the interpreter and can matter: no hints, types, docstrings, assertions."""
    pending: list[ast.AST] = list(reversed(function.body))
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("tl.static_assert", "tl.assume", "tl.multiple_of", "tl.max_contiguous", "tl.static_print"):
                continue
            if name in ("tl.program_id", "tl.num_programs"):
                yield node
                continue
        if isinstance(node, ast.keyword) and node.arg in _HINTS:
            continue
        yield node
        children = ast.iter_child_nodes(node)
        if isinstance(node, ast.If) and "INTERPRET" in ast.unparse(node.test):
            children = iter(node.body)
        pending.extend(reversed(list(children)))


def mutants_of(path: Path) -> list[Mutant]:
    """Every mutant of a file, in the order of its text."""
    source = path.read_text(encoding="utf-8")
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def place(line: int, column: int) -> int:
        text = source[starts[line - 1] : starts[line]]
        return starts[line - 1] + (column if text.isascii() else len(text.encode()[:column].decode()))

    def span(node: ast.AST) -> tuple[int, int]:
        return place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)

    def show(node: ast.AST) -> str:
        return source[slice(*span(node))]

    found = {}
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        if not any("triton.jit" in ast.unparse(d) for d in function.decorator_list):
            continue
        edits = [edit for node in _body(function) for mutate in MUTATIONS for edit in mutate(node, show)]
        for kind, node, text in [*edits, *_strides(function, show)]:
            mutant = Mutant(path.name, function.name, kind, *span(node), text, node.lineno)
            found.setdefault((mutant.start, mutant.stop, text), mutant)
    return sorted(found.values(), key=lambda m: (m.start, m.stop, m.text))


def drawn(seed: int = 0, per_file: int = PER_FILE) -> list[Mutant]:
    """The mutants that are run: per file, kinds in turn, each kind in an order drawn by the seed."""
    chosen = []
    for path in sorted(KERNELS.glob("*.py")):
        generator = random.Random(f"{path.name} {seed}")
        kinds: dict[str, list[Mutant]] = {}
        for mutant in mutants_of(path):
            kinds.setdefault(mutant.kind, []).append(mutant)
        for group in kinds.values():
            generator.shuffle(group)
        turns = [group[i] for i in range(max(map(len, kinds.values()), default=0)) for group in kinds.values()
                 if i < len(group)]  # fmt: skip
        chosen += turns[:per_file]
    return chosen


# ------------------------------------------------------------------------------------------------------ runs


def op_of(stem: str) -> str:
    """The op whose tests run a kernel file: its own, or that of the first file that imports it."""
    op = stem
    while op and not list(TESTS.glob(f"test_{op}.py")):
        op = op.rpartition("_")[0]  # expert_mlp_backward.py belongs to expert_mlp
    users = (
        path.stem for path in sorted(KERNELS.glob("*.py")) if f".{stem} import" in path.read_text(encoding="utf-8")
    )
    return op or op_of(next(users))


def stages(file: str) -> list[list[str]]:
    """pytest's arguments for a kernel file, the fastest and likeliest to fail first."""
    op = op_of(Path(file).stem)
    own, memory = (
        [str(path) for path in sorted(TESTS.glob(f"test_{op}*.py"))],
        [str(TESTS / "test_memory.py"), str(TESTS / "test_overflow.py")],
    )
    if op == "common":  # the functions that the others call
        return [[*own, "-m", "quick"], [*memory, "-k", "5x6x37"], [str(TESTS / "test_masked_update.py")]]
    quick, cases = [*own, "-m", "quick"], [*memory, "-k", f"{op}/ or of_{op}_"]
    return [cases, quick, own] if op in COMPARED else [quick, cases, own]


def run(
    mutant: Mutant | None, file: str, limit: int = TEST_SECONDS, only: int | None = None
) -> tuple[str, list[float]]:
    """("killed" | "survived" | "timed out", seconds of each stage) of a mutant, or of the kernels as they are.

    only: the one stage to run, counted from 1.
    """
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "triton_kernels"
        shutil.copytree(KERNELS, copy, ignore=shutil.ignore_patterns("__pycache__"))
        if mutant is not None:
            (copy / file).write_text(mutant.apply((KERNELS / file).read_text(encoding="utf-8")), encoding="utf-8")
        for arguments in stages(file) if only is None else [stages(file)[only - 1]]:
            begun = time.monotonic()
            status = _in_child(lambda arguments=arguments: _pytest(copy, arguments, limit))
            seconds.append(round(time.monotonic() - begun, 1))
            if status != "passed":
                return status, seconds
    return "survived", seconds


def _in_child(function: Callable[[], int]) -> str:
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.setsid()
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            status = function()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it left behind
    if os.WIFSIGNALED(status):
        return "timed out" if os.WTERMSIG(status) == signal.SIGALRM else "killed"
    code = os.WEXITSTATUS(status)
    # pytest: 0 passed, 1 failed, 2 a module could not be imported, 5 nothing collected
    if code not in (0, 1, 2, 5):
        raise RuntimeError(f"the tests could not be run: exit status {code}")
    return "passed" if code in (0, 5) else "killed"


class _Alarm:
    """Each test has so many seconds: a loop without end is one slow test, a slow machine many."""

    def __init__(self, seconds: int):
        self.seconds = seconds

    def pytest_runtest_logstart(self):
        signal.alarm(self.seconds)


def _pytest(copy: Path, arguments: list[str], limit: int) -> int:
    """Run pytest with `moe_unlearn.triton_kernels` taken from `copy`."""
    import pytest

    import moe_unlearn

    name = "moe_unlearn.triton_kernels"
    assert not any(module.startswith(name) for module in sys.modules), "kernels were imported before the fork"
    spec = importlib.util.spec_from_file_location(name, copy / "__init__.py", submodule_search_locations=[str(copy)])
    sys.modules[name] = moe_unlearn.triton_kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    with open(os.devnull, "w", encoding="utf-8") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={ROOT}"]
    return int(pytest.main([*options, *arguments], plugins=[_Alarm(limit)]))


def identity(mutant: Mutant) -> tuple[str, str, str, str]:
    """Its key in EQUIVALENT, which survives edits elsewhere in the file."""
    return mutant.file, mutant.kernel, *mutant.diff((KERNELS / mutant.file).read_text(encoding="utf-8"))


def verdict(mutant: Mutant) -> dict:
    """What became of a mutant, as it is recorded."""
    *_, before, after = key = identity(mutant)
    result, seconds = run(mutant, mutant.file)
    reason = EQUIVALENT.get(key)
    if result == "survived" and reason:
        result = "equivalent"
    return {
        "file": mutant.file, "kernel": mutant.kernel, "line": mutant.line, "kind": mutant.kind, "before": before,
        "after": after, "result": result, "stage": len(seconds), "seconds": round(sum(seconds), 1),
    } | ({"reason": reason} if reason else {})  # fmt: skip


def verdicts(mutants: list[Mutant], jobs: int = 1, unmutated: bool = True) -> list[dict]:
    """Run the mutants in `jobs` processes; if `unmutated`, what killed one must let the kernels pass as they are."""
    # the slow imports, once: every mutant's process is a fork of this one
    importlib.import_module("tests.triton_kernels.memory_cases")
    results = sorted(_shared(mutants, jobs), key=lambda r: (r["file"], r["line"], r["kind"], r["after"]))
    kills = {(op_of(Path(r["file"]).stem), r["stage"]): r["file"] for r in results if r["result"] != "survived"}
    for (op, stage), file in sorted(kills.items()) if unmutated else ():
        result, seconds = run(None, file, only=stage)
        print(f"{op}, stage {stage}, as it is: {result} {seconds[0]} s", flush=True)
        if result != "survived":
            raise RuntimeError(f"the kernels of {op} fail stage {stage} of their tests unmutated: {result}")
    return results


def _shared(mutants: list[Mutant], jobs: int) -> Iterator[dict]:
    """The verdicts as they come from `jobs` forked workers."""
    read, write = os.pipe()
    workers = []
    for job in range(jobs):
        workers.append(os.fork())
        if workers[-1] == 0:
            try:
                os.close(read)
                for mutant in mutants[job::jobs]:
                    # one write below PIPE_BUF is atomic
                    os.write(write, json.dumps(verdict(mutant)).encode()[:4000] + b"\n")
            finally:
                os._exit(0)
    os.close(write)
    count = 0
    with os.fdopen(read, encoding="utf-8") as lines:
        for count, line in enumerate(lines, 1):
            result = json.loads(line)
            print(f"{count}/{len(mutants)} {line_of(result)}", flush=True)
            yield result
    for worker in workers:
        os.waitpid(worker, 0)
    if count < len(mutants):
        raise RuntimeError(f"{len(mutants) - count} mutants have no verdict: a worker died")


def line_of(result: dict) -> str:
    """One verdict for people."""
    return (
        f"{result['result']:10} {result['seconds']:5.1f} s  {result['file']}:{result['line']} {result['kernel']}, "
        f"{result['kind']}: {result['before']}  ->  {result['after']}"
    )


def summary(results: list[dict]) -> dict[str, dict[str, int]]:
    """How many of each verdict per file."""
    counts: dict[str, dict[str, int]] = {}
    for result in results:
        one = counts.setdefault(result["file"], {"killed": 0, "timed out": 0, "equivalent": 0, "survived": 0})
        one[result["result"]] += 1
    return counts


def rotation() -> int:
    """The seed of the commit's sample: its hash, or the day outside a repository."""
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return int(time.time() // 86400)
    return int(git.stdout[:8], 16)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, help="run so many, drawn by --seed, and record nothing")
    parser.add_argument("--seed", type=int, help="default: from the commit")
    parser.add_argument("--only", help="mutate this file only, e.g. gram, and record nothing")
    parser.add_argument("--again", action="store_true", help="run the recorded survivors again and record what changed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--list", action="store_true", help="show the mutants, run nothing")
    options = parser.parse_args(arguments)
    mutants = [mutant for mutant in drawn() if options.only in (None, mutant.file.removesuffix(".py"))]
    seed = rotation() if options.seed is None else options.seed
    if options.sample:
        mutants = [mutant for mutant in mutants if identity(mutant) not in EQUIVALENT]
        mutants = random.Random(seed).sample(mutants, min(options.sample, len(mutants)))
        print(f"{len(mutants)} mutants drawn by seed {seed}; again with: "
              f"python -m tests.mutants --sample {options.sample} --seed {seed}")  # fmt: skip
    if options.again:
        recorded = json.loads(RESULTS.read_text(encoding="utf-8"))
        survived = [(r["file"], r["kernel"], r["before"], r["after"]) for r in recorded["survivors"]]
        mutants = [mutant for mutant in mutants if identity(mutant) in survived]
    if options.list:
        for mutant in mutants:
            *_, before, after = identity(mutant)
            print(f"{mutant.file}:{mutant.line} {mutant.kernel}, {mutant.kind}: {before}  ->  {after}")
        return 0
    begun = time.monotonic()
    # a sample is drawn in `make test`, which runs the same tests on the kernels as they are
    results = verdicts(mutants, options.jobs, unmutated=not options.sample)
    survivors = [result for result in results if result["result"] == "survived"]
    counts = summary(results)
    for file, count in counts.items():
        print(f"{file}: {', '.join(f'{n} {what}' for what, n in count.items() if n)}")
    if options.again:
        for result in results:
            of_file = recorded["counts"][result["file"]]
            of_file["survived"] -= 1
            of_file[result["result"]] += 1
        recorded["survivors"] = survivors
        recorded["equivalent"] += [r for r in results if r["result"] == "equivalent"]
        RESULTS.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    elif not (options.sample or options.only):
        record = {
            "mutants": len(results), "seconds": round(time.monotonic() - begun), "counts": counts,
            "survivors": survivors, "equivalent": [r for r in results if r["result"] == "equivalent"],
        }  # fmt: skip
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for survivor in survivors:
        print("SURVIVED", line_of(survivor))
    return 1 if survivors else 0


if __name__ == "__main__":
    # the interpreter is chosen when a kernel is decorated
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    sys.exit(main())
