"""A pytest plugin for the device matrix: which tests are run, and a line of the journal for each as it ends.

    pytest ... -p tests.gpu_plugin --covering tests/triton_kernels --journal FILE --stage matrix

Works under pytest-xdist: the controller writes, and a worker whose test has left the device unusable ends itself, so
that the tests after it are run by another.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from benchmarks import stamp
from benchmarks.gpu_summary import done
from benchmarks.journal import Journal
from tests.support.triton_cache import CacheCount

_SHOWN = 1500  # characters of a failure


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu", "the device matrix")
    group.addoption(
        "--covering",
        action="append",
        default=[],
        metavar="PATH",
        help="of the tests below it that are not of CUDA only so many that every value of every parameter occurs",
    )
    group.addoption("--one-each", action="store_true", help="one case of each test function")
    group.addoption(
        "--left", type=Path, metavar="DIR", help="only tests that have not passed in the GPU runs below DIR"
    )
    group.addoption("--journal", help="the file that gets a line for each test")
    group.addoption("--stage", default="matrix", help="the stage that these lines belong to")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Worker(config))
    if config.getoption("--journal") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Writer(Journal(config.getoption("--journal"), config.getoption("--stage"))))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = sampled(items, config.rootpath, config.getoption("--covering"), one_each=config.getoption("--one-each"))
    if folder := config.getoption("--left"):
        passed, _ = done(folder, stamp.kernel_sources_hash())
        kept = [item for item in kept if (config.getoption("--stage"), item.nodeid) not in passed]
    dropped = [item for item in items if id(item) not in set(map(id, kept))]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Where earlier runs have left nothing to do, having run nothing is no failure."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.config.getoption("--left"):
        session.exitstatus = pytest.ExitCode.OK


def sampled(items: Sequence[pytest.Item], root: Path, below: Sequence[str], *, one_each: bool) -> list[pytest.Item]:
    """The items to run, in order; those of each function are thinned out where they lie below one of the paths.

    What a function claims of several implementations is a function for each.
    """
    functions: dict[tuple, list[pytest.Item]] = {}
    for item in items:
        name, impl = getattr(item, "originalname", item.name), str(_choices(item).get("impl", (str, ""))[1])
        functions.setdefault((item.path, name, impl), []).append(item)
    kept: set[int] = set()
    for (path, _, impl), own in functions.items():
        if one_each:
            chosen = own[:1]
        elif impl != "cuda" and any(path.is_relative_to(root / folder) for folder in below):
            chosen = [own[i] for i in covering([_choices(item) for item in own])]
        else:
            chosen = own
        kept.update(map(id, chosen))
    return [item for item in items if id(item) in kept]


def covering(rows: Sequence[Mapping[str, object]]) -> list[int]:
    """Positions of rows, sorted, such that each value that a name has in any row is in one of them."""
    missing = {pair for row in rows for pair in row.items()}
    chosen: list[int] = [0] if rows and not missing else []
    while missing:
        best = max(range(len(rows)), key=lambda i: len(missing & set(rows[i].items())))
        chosen.append(best)
        missing -= set(rows[best].items())
    return sorted(chosen)


def _choices(item: pytest.Item) -> Mapping[str, object]:
    """Return the value of each parameter of the test in this item, such that equal values are equal."""
    return {name: _key(value) for name, value in item.callspec.params.items()} if hasattr(item, "callspec") else {}


def _key(value: object) -> object:
    try:
        hash(value)
    except TypeError:
        return id(value)  # one object wherever it is a parameter
    return type(value), value  # 1 is not True


class _Writer:
    """Writes what the reports say."""

    def __init__(self, journal: Journal):
        self.journal = journal

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        # the controller of xdist collects nothing itself
        if session.items:
            self.journal.write("collected", tests=len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: object, ids: Sequence[str]) -> None:
        if node.gateway.id == "gw0":
            self.journal.write("collected", tests=len(ids))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(report, "failed", report.longreprtext)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._write(report, "failed", report.longreprtext)
        elif report.skipped:
            why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            self._write(report, "skipped", why.removeprefix("Skipped: "))
        elif report.when == "call":
            self._write(report, "passed", "")

    def _write(self, report: pytest.TestReport | pytest.CollectReport, outcome: str, why: str) -> None:
        known = dict(getattr(report, "user_properties", ()))
        compiled = {"triton": known["triton"]} if "triton" in known else {}
        seconds = round(getattr(report, "duration", 0.0), 3)
        self.journal.write("test", name=report.nodeid, outcome=outcome, seconds=seconds, why=why[-_SHOWN:], **compiled)


class _Worker:
    """Counts compilations of each test, and leaves the process whose device a test has broken."""

    def __init__(self, config: pytest.Config):
        self.journal = config.getoption("--journal")
        self.stage, self.in_worker = config.getoption("--stage"), hasattr(config, "workerinput")
        self.count = CacheCount()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
        report = yield
        if report.when == "call" and (taken := self.count.taken()) != (0, 0):
            report.user_properties.append(("triton", taken))
        if report.failed and self.in_worker and not device_usable():
            if self.journal:
                why = report.longreprtext[-_SHOWN:]
                Journal(self.journal, self.stage).write("note", test=item.nodeid, device_lost=why)
            os._exit(70)  # xdist counts the test as failed and starts another worker
        return report


def device_usable() -> bool:
    """Whether the GPU still answers this process; where there is none, nothing can have broken it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except Exception:  # noqa: BLE001 -- whatever it is, the process is lost
        return False
    return True
