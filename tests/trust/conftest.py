"""The verbs on a tiny model, for a session's tests of faults and of damage."""

import pytest

from tests.trust.commands import Commands


@pytest.fixture(scope="session")
def commands(tmp_path_factory):
    """Every verb that writes, each time in a copy of one folder."""
    return Commands(tmp_path_factory.mktemp("commands"))
