"""Test kernels in a team's own pytest run, through `@pytest.mark.kernel_case(case)` and the fixture `kernel_case`.

    @pytest.mark.kernel_case(softmax)          # one or several `moe_unlearn.regress.case.Case`
    def test_softmax(kernel_case):
        kernel_case.check()

    pytest --kernel-record        once, and for new cases: adds to the store, never overwrites
    pytest                        compares every kernel with its record

pytest imports this module in every run of an environment that has moe-unlearn. It is therefore installed outside of
the package, whose import takes seconds, and imports the package in the fixture only.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from moe_unlearn.regress.case import Case
    from moe_unlearn.regress.report import Result

MARK = "kernel_case"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("moe-unlearn kernels")
    group.addoption("--kernel-record", action="store_true", help="record the cases that have no record yet")
    group.addoption("--kernel-accept", metavar="REASON", help="record new values over the former ones, for a reason")
    group.addoption("--kernel-strict", action="store_true", help="other bits fail, however accurate")
    parser.addini("kernel_store", "folder of the records, from the root folder", default="kernel_store")
    parser.addini("kernel_repros", "folder of repro scripts, from the root folder", default="kernel_repros")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{MARK}(*cases): hold kernels against what they gave when they were recorded")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize a marked test with one item for each case of the mark."""
    mark = metafunc.definition.get_closest_marker(MARK)
    if mark is None:
        return
    if MARK not in metafunc.fixturenames:
        raise pytest.UsageError(f"{metafunc.definition.nodeid}: a test marked {MARK} takes the fixture `{MARK}`")
    if not mark.args:
        raise pytest.UsageError(f"{metafunc.definition.nodeid}: expected the mark {MARK}(case, ...); got no case")
    metafunc.parametrize(MARK, mark.args, ids=[getattr(case, "name", None) for case in mark.args], indirect=True)


class KernelCase:
    """Compares cases with their records in the store of this run; it is what the fixture gives."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.case = getattr(request, "param", None)
        self._config = request.config
        self._path, self._module = Path(request.path), request.module

    def check(self, case: "Case | None" = None) -> "Result":
        """Fail the test unless `case` (default: the mark's) gives what is recorded, or is as accurate.

        With --kernel-record and --kernel-accept it is recorded instead. Returns the `report.Result`.
        """
        __tracebackhide__ = True
        from moe_unlearn.regress import report, verbs
        from moe_unlearn.regress.case import Case
        from moe_unlearn.regress.store import Store

        case = self.case if case is None else case
        if case is None:
            raise pytest.UsageError(f"{self._path.name}: kernel_case.check() expects a Case, or a mark that has one")
        option, root = self._config.getoption, self._config.rootpath
        store = Store(root / self._config.getini("kernel_store"))
        if not isinstance(case, Case):
            raise pytest.UsageError(f"{self._path.name}: expected a Case; got {case!r}")
        if any(case is value for value in vars(self._module).values()):
            # the test file becomes the origin, since a script can load the case from there
            case = dataclasses.replace(case, origin=case.origin or str(self._path))
        recorded = case.name in store.current()
        if option("kernel_accept") and recorded:
            result = verbs.accept(case, store, option("kernel_accept"))
        elif option("kernel_record") and not recorded:
            result = verbs.record(case, store)
        else:
            repros = root / self._config.getini("kernel_repros")
            result = verbs.check(case, store, strict=option("kernel_strict"), repros=repros)
        if result.code != report.FINE:
            hint = "\nrecord it with pytest --kernel-record" if result.status == "unrecorded" else ""
            pytest.fail(report.text([result]) + hint, pytrace=False)
        return result


@pytest.fixture
def kernel_case(request: pytest.FixtureRequest) -> KernelCase:
    """Return the case of the mark, or a way to check one: `kernel_case.check(case)`."""
    return KernelCase(request)
