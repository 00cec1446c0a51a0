"""Every verb that writes, with a disk that fails or a process that dies at the n-th write: nothing is lost or half.

A command ends as bad input does, or what it wrote is whole; a file under its own name is what was there before or what
an undisturbed command writes; and the command given once more, when the disk is well, ends as if nothing had been.
`make test` draws a few n for each verb; nightly tries all.
"""

import random

import pytest

from tests.trust.commands import VERBS
from tests.trust.faults import CRASHES, ERRORS, Fault

ENDS = {True: {"killed"}, False: {"refused", "whole"}}  # by whether the fault kills


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("verb", VERBS)
def test_a_sample_of_faults(verb, kind, commands):
    calls, _ = commands.whole(verb)
    for at in random.Random(f"{verb} {kind}").sample(range(calls), 1 if verb == "run" else 2):
        assert commands.meets(verb, Fault(kind, at)) in ENDS[kind in CRASHES]


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("verb", VERBS)
def test_every_fault(verb, kind, commands):
    """Faults of a run, which is resumed each time, take an hour or two."""
    calls, _ = commands.whole(verb)
    for at in range(calls):
        assert commands.meets(verb, Fault(kind, at)) in ENDS[kind in CRASHES]
