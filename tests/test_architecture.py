"""The house rules: import directions, size budgets, one name per op, nothing dangerous imported."""

import ast
import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "moe_unlearn"

# Lower floors first: a package, or a module beside the packages, imports only from floors below its own.
FLOORS = [
    {
        "triton_kernels",
        "choices",
        "config",
        "errors",
        "files",
        "lazy",
        "mollm",
        "offload",
        "on_demand",
        "page",
        "progress",
        "sharding",
        "testing",
    },
    {"backend", "ranks"},
    {"checkpoint", "native"},
    {"delta", "ops"},
    {"expert_adapters", "expert_state", "optim_state"},
    {"experts", "masks", "optim", "regress"},
    {"model", "view"},
    {"data", "losses", "routers", "seuf", "survive", "trace", "verify", "wagle"},
    {"prepare", "router_aux"},
    {"metrics", "plan"},
    {"audit", "step"},
    {"trainer"},
    {"integrations", "runs"},
    {"benchmark"},
    {"cli"},
    {"__main__"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
USES_TRANSFORMERS = {
    "experts",
    "masks",
    "trainer",
    "audit",
    "data",
    "metrics",
    "integrations",
    "model",
    "benchmark",
    "runs",
    "cli",
}
OPS = {
    "route",
    "retain_weights",
    "expert_mlp",
    "expert_wgrad",
    "token_loss",
    "gram",
    "weight_score",
    "masked_update",
}
FOLDERS = {"csrc", "triton_kernels", "moe_unlearn", "benchmarks", "tests"}
# functions of users' own keywords, each with a default, and a class whose parameters open-unlearning chooses
WIDE = {
    "benchmark/suite.py:unlearning",
    "data/stream.py:__init__",
    "integrations/open_unlearning/methods.py:__init__",
    "metrics/side_effects.py:side_effects",
    "metrics/evaluate.py:evaluate",
    "regress/revision.py:compare",
}
# what a docstring of a function does not begin with: its first word is the verb that says what the function does
NO_VERBS = {
    "A", "All", "An", "As", "Each", "Every", "How", "In", "Inside", "It", "No", "Of", "On", "One", "That", "The",
    "This", "Those", "What", "Where", "Whether", "Which", "Who", "Why",
}  # fmt: skip
FORBIDDEN_IMPORTS = {"pickle", "marshal", "joblib", "dill", "cloudpickle", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "torch.save", "os.system"}
# the official form of WAGLE's masks is a pickle of tensors: read without running it, written for that code
ALLOWED_CALLS = {"masks": {"torch.load", "torch.save"}}


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """Every node of a file; files are parsed once for all tests."""
    return [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]


def sources():
    return sorted(PACKAGE.rglob("*.py")) + sorted((ROOT / "triton_kernels").glob("*.py"))


def room_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    if relative.parts[0] == "triton_kernels":
        return "triton_kernels"
    return relative.parts[1].removesuffix(".py")


def imports(path: Path):
    """Dotted names of everything a file imports, inside functions too."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or room_of(path) == "triton_kernels", f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def project_imports(path: Path):
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "moe_unlearn" and len(parts) > 1:
            yield parts[1]


def test_imports_point_downward():
    wrong = []
    for path in sources():
        own = room_of(path)
        if own == "__init__":
            continue
        assert own in FLOOR, f"{path} stands on no floor: add it to FLOORS on purpose"
        for used in project_imports(path):
            if used not in ("__version__", own) and FLOOR[used] >= FLOOR[own]:
                wrong.append(f"{path.relative_to(ROOT)} (floor {FLOOR[own]}) imports {used} (floor {FLOOR[used]})")
    assert not wrong


def test_every_room_is_there():
    assert FLOOR.keys() == {room_of(path) for path in sources()} - {"__init__"}


def test_who_may_import_what():
    for path in sources():
        own = room_of(path)
        for name in imports(path):
            top = name.split(".")[0]
            assert top not in FORBIDDEN_IMPORTS, f"{path} imports {name}"
            assert top not in ("benchmarks", "tests"), f"{path} imports {name}"
            if top == "transformers":
                assert own in USES_TRANSFORMERS, f"{own} imports transformers"
            if "triton_kernels" in name:
                # regress launches them to see what is compiled
                assert own in ("ops", "triton_kernels", "regress"), f"{own} touches a kernel"


def test_no_dangerous_calls():
    calls = [(path, node) for path in sources() for node in nodes(path) if isinstance(node, ast.Call)]
    assert calls
    for path, node in calls:
        name = ast.unparse(node.func)
        allowed = ALLOWED_CALLS.get(room_of(path), set())
        assert name not in FORBIDDEN_CALLS - allowed, f"{path}:{node.lineno} calls {name}"
        if name == "torch.load":
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert given.get("weights_only") == "True", f"{path}:{node.lineno} would run a pickle"
        shell = [k for k in node.keywords if k.arg == "shell"]
        assert not shell, f"{path}:{node.lineno} uses a shell"
        trust = [ast.unparse(k.value) for k in node.keywords if k.arg == "trust_remote_code"]
        if re.search(r"(^|[.])(Auto\w+|kind)\.from_(pretrained|config)$", name):
            # without a word about it transformers asks on the terminal
            assert trust, f"{path}:{node.lineno} leaves open whether it trusts code"
        asked = {
            "loading.py": "how.trust_remote_code",
            "whole.py": "trust_remote_code",
            "arguments.py": "options.trust_remote_code",
        }
        assert {*trust} <= {"False", asked.get(path.name)}, f"{path}:{node.lineno} trusts remote code"


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_size_budgets():
    too_long = {str(p): lines(p) for p in sources() if lines(p) > 400}
    too_long |= {str(p): lines(p) for p in (ROOT / "tests").rglob("*.py") if lines(p) > 500}
    too_long |= {str(p): lines(p) for p in (ROOT / "benchmarks").rglob("*.py") if lines(p) > 400}
    if lines(ROOT / "setup.py") > 120:
        too_long["setup.py"] = lines(ROOT / "setup.py")
    assert not too_long


def test_functions_take_at_most_ten_parameters():
    """What travels together is one object; kernels are launched with each operand by itself."""
    found = set()
    for path in sources():
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef) and path.parent != ROOT / "triton_kernels":
                given = node.args
                names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
                if len(names) - (names[:1] in (["self"], ["cls"])) > 10:
                    found.add(f"{path.relative_to(PACKAGE)}:{node.name}")
    assert found == WIDE


def test_few_statements_are_kept_out_of_the_formatter():
    folders = (PACKAGE, ROOT / "triton_kernels", ROOT / "benchmarks", ROOT / "tests")
    texts = [path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py")]
    assert sum(text.count("# fmt: " + "skip") for text in texts) < 100


def test_init_files_only_reexport():
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.Expr, ast.If)
    for path in PACKAGE.rglob("__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert all(isinstance(node, allowed) for node in body), f"{path} holds more than imports"
        for node in body:
            if isinstance(node, ast.If):  # what type checkers see of names that are loaded on demand
                assert ast.unparse(node.test) == "TYPE_CHECKING", f"{path}:{node.lineno}"
                assert all(isinstance(inner, allowed[:2]) for inner in node.body), f"{path}:{node.lineno}"
                assert [*map(type, node.orelse)] == [ast.Expr], f"{path}:{node.lineno}"
            if isinstance(node, ast.Assign):
                assert ast.unparse(node.targets[0]) in ("__all__", "__version__"), f"{path}:{node.lineno}"


def test_one_op_one_file():
    found = {p.stem for p in (PACKAGE / "ops").glob("*.py")} - {
        "__init__",
        "bits",
        "checks",
        "custom",
        "exact_sums",
        "gate",
        "legal",
        "low_rank",
        "moments",
        "schema",
        "sink",
    }  # what ops share
    assert found == OPS
    assert {p.stem for p in (PACKAGE / "ops" / "costs").glob("*.py")} - {"__init__", "cost"} == OPS


# errors.py has three classes of one line each, which the tests of whatever raises them see
WITHOUT_TESTS = {"__main__", "errors", "triton_kernels"}


def test_every_room_has_tests_of_its_name():
    names = {path.name for path in (ROOT / "tests").iterdir()}
    missing = {
        room
        for room in FLOOR.keys() - WITHOUT_TESTS
        if room not in names and not any(name.startswith(f"test_{room}") for name in names)
    }
    assert not missing and WITHOUT_TESTS <= FLOOR.keys()


def homes() -> dict[str, Path]:
    """Return the folders of tests/ops by op."""
    return {path.name: path for path in (ROOT / "tests" / "ops").iterdir() if (path / "cases.py").exists()}


def test_an_op_has_one_home_for_its_cases():
    """There the tests of its reference stand, and of all that its implementations claim alike."""
    assert len(homes()) >= 4 and homes().keys() <= OPS
    for op, folder in homes().items():
        names = {path.name for path in folder.glob("*.py")} - {"cases.py"}
        assert f"test_{op}.py" in names and all(name.startswith(f"test_{op}") for name in names), folder


def test_no_test_imports_a_test():
    """What tests share is in tests/support, and in the cases of an op; an op without such has them in its tests."""
    without = "|".join(OPS - homes().keys()) or "none"
    cases = re.compile(rf"tests\.(ops|native|triton_kernels)\.test_({without})(_\w+)?(\..*)?")
    wrong, found = [], 0
    for path in (ROOT / "tests").rglob("*.py"):
        for node in nodes(path):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("tests"):
                found += 1
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                of_tests = [name for name in names if ".test_" in name or ".conftest" in name]
                if not all(map(cases.fullmatch, of_tests)):
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {', '.join(names)}")
    assert found > 200 and not wrong, "\n".join(wrong)


def test_top_level_is_fixed():
    """Of what is tracked: whoever works here may keep other folders beside it."""
    if shutil.which("git") is None:
        pytest.skip("there is no git")
    listing = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True)
    if listing.returncode:
        pytest.skip(f"not a git checkout: {os.fsdecode(listing.stderr).strip()}")
    folders = {path.partition("/")[0] for path in os.fsdecode(listing.stdout).split("\0") if "/" in path}
    assert {name for name in folders if not name.startswith(".")} == FOLDERS


def test_one_place_switches_modes():
    """`train(flag)` gives every submodule one mode; what each had before, only `modes` restores."""
    wrong = []
    for path in sources():
        for node in nodes(path):
            method = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "train"
            written = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr == "training"
            if (method and node.args) or (written and path.name != "modes.py"):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong


def pokes_into_a_step(node: ast.AST) -> bool:
    """Whether a node takes a private attribute of a step, or is a function with an untyped parameter `step`."""
    names = r"(self\.)?_?(unlearn_)?(step|twin|shadow)"
    if isinstance(node, ast.Attribute):
        private = node.attr.startswith("_") and not node.attr.startswith("__")
        return private and re.fullmatch(names, ast.unparse(node.value)) is not None
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
        target, name, *_ = map(ast.unparse, node.args)
        return name.startswith("'_") and re.fullmatch(names, target) is not None
    if isinstance(node, ast.FunctionDef):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        return any(argument.arg == "step" and argument.annotation is None for argument in arguments)
    return False


def test_a_step_is_seen_through_its_view():
    """Outside of `step`, whose functions know its parts; in ops and regress a step is an optimizer's count."""
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node).splitlines()[0]}"
        for path in sources()
        if room_of(path) not in ("step", "ops", "regress", "triton_kernels")
        for node in nodes(path)
        if pokes_into_a_step(node)
    ]
    assert not wrong


def test_what_pokes_into_a_step_is_seen():
    for source in ("step._norm", "self.step._masks.x", "getattr(self._step, '_norm', 0)", "def f(step): pass"):
        allowed = source.replace("._n", ".n").replace("._m", ".m").replace("'_", "'").replace("(step)", "(step: Step)")
        seen = [any(map(pokes_into_a_step, ast.walk(ast.parse(text)))) for text in (source, allowed)]
        assert seen == [True, False], source


def leaves_the_encoding_to_the_locale(call: ast.Call) -> bool:
    """Whether `call` opens, reads or writes a text file without naming its encoding."""
    method = isinstance(call.func, ast.Attribute)
    name = call.func.attr if method else getattr(call.func, "id", "")
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in given or ast.unparse(call.func) == "os.open":
        return False
    if method and name in ("read_text", "write_text"):
        return len(call.args) <= (name == "write_text")
    if name not in ("open", "fdopen", "TemporaryFile", "NamedTemporaryFile"):
        return False
    # Path.open and tempfile's have the mode first, open and os.fdopen after the file
    modes = call.args[0 if name == "open" and method or name.endswith("File") else 1 :][:1]
    mode = given.get("mode", modes[0] if modes else None)
    return not name.endswith("File") if mode is None else "b" not in ast.unparse(mode)


def test_text_files_name_their_encoding():
    """Else what is read and written, and whether that fails, depends on the locale."""
    paths = [ROOT / "setup.py", *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))]
    nameless = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in paths
        for node in nodes(path)
        if isinstance(node, ast.Call) and leaves_the_encoding_to_the_locale(node)
    ]
    assert not nameless


def test_docstrings_of_functions_begin_with_a_verb():
    found, wrong = 0, []
    folders = (PACKAGE, ROOT / "benchmarks", ROOT / "triton_kernels")
    for path in [path for folder in folders for path in folder.rglob("*.py")]:
        for node in nodes(path):
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if text is not None:
                found += 1
                word = text.split()[0].rstrip(",:")
                if word in NO_VERBS or re.fullmatch("[A-Z][a-z]+(-[a-z]+)?", word) is None:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {text.splitlines()[0]}")
    assert found > 900 and not wrong, "\n".join(wrong)
