"""Every kind of file that a command reads again, damaged in every form: nothing damaged is used without a word.

What users bring carries no digest of ours and cannot tell: texts, recipes, models from elsewhere. `make test` tries
each form once; nightly some fifty places of each.
"""

import itertools
from collections import Counter

import pytest

from tests.support.damage import FORMS
from tests.trust.commands import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_damage(kind, commands):
    files = commands.files(kind)
    found = Counter(commands.reads(kind, files[i % len(files)], form, form) for i, form in enumerate(FORMS))
    assert found["same"] < 2, found  # 64 bytes may have been zero already


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_much_damage(kind, commands):
    files = commands.files(kind)
    for file, form, draw in itertools.product(files, FORMS, range(50 // len(files) + 1)):
        assert commands.reads(kind, file, form, f"{form} {draw}") in ("refused", "harmless", "same")
