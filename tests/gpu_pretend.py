"""A pytest plugin that collects as a GPU machine would, without a GPU, and fails where a test would be skipped there.

    python -m pytest --collect-only -p tests.gpu_pretend --skips-allowed REGEX tests/native/test_cuda_device.py

Marks are evaluated as on an H200. A call of `pytest.skip` in a test file or in a fixture of its tests counts whatever
its condition: nobody knows here which way it goes there.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch


def pretend() -> None:
    """Whoever asks torch from now on hears of an H200; nothing runs on it."""
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_name = lambda device=None: "a pretended H200"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--skips-allowed", required=True, help="the regular expression of reasons that may occur")


def pytest_configure(config: pytest.Config) -> None:
    pretend()
    config.pluginmanager.register(_Watch(re.compile(config.getoption("--skips-allowed"), re.IGNORECASE)))


class _Watch:
    """Collects the reasons of a session."""

    def __init__(self, allowed: re.Pattern):
        self.allowed, self.reasons = allowed, {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.reasons[str(report.longrepr[2]).removeprefix("Skipped: ")] = report.nodeid

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            for reason in marked(item):
                self.reasons.setdefault(reason, item.nodeid)
        for file in {item.path for item in session.items}:
            for reason in called(file.read_text(encoding="utf-8")):
                self.reasons.setdefault(reason, str(file))
        for function in fixtures(session.items, session.config.rootpath):
            for reason in called(source(function)):
                self.reasons.setdefault(reason, function.__qualname__)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        unknown = {why: where for why, where in self.reasons.items() if not self.allowed.search(why)}
        print(f"\n{len(session.items)} tests, {len(self.reasons)} reasons to skip one")
        for reason, where in unknown.items():
            print(f"not allowed on a GPU: {reason!r} in {where}")
        if unknown and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def marked(item: pytest.Item) -> Iterator[str]:
    """The reasons of marks that would skip a test."""
    for mark in item.iter_markers():
        if mark.name == "skip" or (mark.name == "skipif" and any(mark.args)):
            yield mark.kwargs.get("reason") or next((a for a in mark.args if isinstance(a, str)), "no reason")


def called(text: str) -> Iterator[str]:
    """The reasons of all calls of pytest.skip in a source; a 0 stands for what is put into one at run time."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.skip":
            reason = node.args[0] if node.args else node.keywords[0].value
            parts = reason.values if isinstance(reason, ast.JoinedStr) else [reason]
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "0" for part in parts)


def fixtures(items: Iterable[pytest.Item], root: Path) -> set[Callable]:
    """The functions of all fixtures below `root` that the tests use."""
    found = set()
    for item in items:
        for definitions in item._fixtureinfo.name2fixturedefs.values():
            found |= {inspect.unwrap(definition.func) for definition in definitions}
    functions = {function: Path(inspect.getfile(function)) for function in found if inspect.isfunction(function)}
    return {f for f, file in functions.items() if file.is_relative_to(root) and "site-packages" not in file.parts}


def source(function: Callable) -> str:
    """The source of a function, as a module."""
    return textwrap.dedent(inspect.getsource(function))
