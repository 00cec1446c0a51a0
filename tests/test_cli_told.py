"""What verbs tell beside their results: why a mask keeps fewer weights, and with --quiet nothing but warnings."""

import logging
from types import SimpleNamespace

import pytest

from moe_unlearn import progress
from moe_unlearn.cli.mask import _why_fewer, told

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("kept, why", [(75, True), (79, False), (80, False)])
def test_a_mask_that_keeps_fewer_weights_than_asked_says_why(kept, why):
    """By one it is fewer where the share is not one of whole weights."""
    made = SimpleNamespace(fraction=kept / 100, shapes={"a": (5, 16), "b": (20,)})
    assert ("the others have the score 0" in _why_fewer(made, 0.799)) is why


@pytest.mark.parametrize("bars", [True, False])
def test_what_the_package_logs_is_told_unless_it_shall_be_quiet(bars, capsys, caplog):
    log = logging.getLogger("moe_unlearn.wagle")
    with progress.shown(progress.Form(bars=bars)), told():
        log.info("group 1 is scored")
        log.warning("a warning")
    assert ("group 1 is scored" in capsys.readouterr().err) is bars
    assert "a warning" in caplog.text and not logging.getLogger("moe_unlearn").handlers
