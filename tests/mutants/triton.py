"""Mutants of the Triton kernels: every `@triton.jit` function of `triton_kernels/`, by rules over its syntax tree.

Each runs on a copy of the package: the op's quick tests, then its memory and overflow cases, then its whole test file.
"""

import ast
import importlib.util
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.mutants.mutant import ROOT, Mutant, in_turn

KERNELS = ROOT / "triton_kernels"
TESTS = ROOT / "tests" / "triton_kernels"
PER_FILE = 5
COMPARED = {"expert_wgrad", "route", "weight_score"}  # their memory cases compare with the reference, bit for bit

# ------------------------------------------------------------------------------------------------------ edits

# node -> (kind, node to replace, new text); `show` gives the source text of a node
Edit = tuple[str, ast.AST, str]
_COMPARISONS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "=="}
_CALLS = {
    "tl.minimum": "tl.maximum",
    "tl.maximum": "tl.minimum",
    "tl.max": "tl.min",
    "tl.min": "tl.max",
    "tl.sum": "tl.max",
    "tl.cdiv": "tl.minimum",
}
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
    _comparison,
    _arithmetic,
    _negation,
    _constant,
    _call,
    _assignment,
)


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


def files() -> list[Path]:
    return sorted(KERNELS.glob("*.py"))


def path_of(file: str) -> Path:
    return KERNELS / file


def drawn(seed: int = 0) -> list[Mutant]:
    """Return PER_FILE mutants of each file."""
    return [
        mutant
        for path in files()
        for mutant in in_turn(mutants_of(path), random.Random(f"{path.name} {seed}"), PER_FILE)
    ]


# ------------------------------------------------------------------------------------------------------ runs


class Stage(NamedTuple):
    arguments: tuple[str, ...]


def op_of(stem: str) -> str:
    """Return the op whose tests run a kernel file: its own, or that of the first file that imports it."""
    op = stem
    while op and not list(TESTS.glob(f"test_{op}.py")):
        op = op.rpartition("_")[0]  # expert_mlp_backward.py belongs to expert_mlp
    users = (path.stem for path in files() if f".{stem} import" in path.read_text(encoding="utf-8"))
    return op or op_of(next(users))


def stages(file: str) -> list[Stage]:
    """Return the tests of a kernel file, the fastest and likeliest to fail first."""
    op = op_of(Path(file).stem)
    shared = (ROOT / "tests" / "ops").glob(f"**/test_{op}*.py")
    own = [*map(str, (*sorted(TESTS.glob(f"test_{op}*.py")), *sorted(shared))), "--impl=triton"]
    memory = [str(TESTS / "test_memory.py"), str(TESTS / "test_overflow.py")]
    quick, whole = Stage((*own, "-m", "quick")), Stage((*own,))
    if op == "common":  # the functions that the others call
        return [quick, Stage((*memory, "-k", "5x6x37")), *stages("masked_update.py")[2:]]
    cases = Stage((*memory, "-k", f"{op}/ or of_{op}_"))
    return [cases, quick, whole] if op in COMPARED else [quick, cases, whole]


def prepare() -> None:
    importlib.import_module("tests.triton_kernels.memory_cases")


def copy(folder: Path, mutant: Mutant | None) -> None:
    kernels = folder / "triton_kernels"
    shutil.copytree(KERNELS, kernels, ignore=shutil.ignore_patterns("__pycache__"))
    if mutant is not None:
        source = path_of(mutant.file).read_text(encoding="utf-8")
        (kernels / mutant.file).write_text(mutant.apply(source), encoding="utf-8")


def build(folder: Path, stage: Stage) -> bool:
    """Build nothing: Triton reads the sources."""
    return True


def enter(folder: Path, stage: Stage) -> None:
    """Take `moe_unlearn.triton_kernels` from the folder."""
    import moe_unlearn

    name, kernels = "moe_unlearn.triton_kernels", folder / "triton_kernels"
    assert not any(module.startswith(name) for module in sys.modules), "kernels were imported before the fork"
    spec = importlib.util.spec_from_file_location(
        name, kernels / "__init__.py", submodule_search_locations=[str(kernels)]
    )
    sys.modules[name] = moe_unlearn.triton_kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
