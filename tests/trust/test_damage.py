"""Every kind of file that a command reads again, damaged in every form: nothing damaged is used without a word.

What users bring carries no digest of ours and cannot tell: texts, recipes, models from elsewhere. `make test` tries
each form once; nightly some fifty places of each.
"""

import itertools
import shutil
from collections import Counter

import pytest

from tests.trust.damage import FORMS, outcome
from tests.trust.faults import Fault, attempt
from tests.trust.test_faults import VERBS, contents, given, undisturbed  # noqa: F401  # fixtures

# kind of file: the verb that reads it, the verb that makes it and where that is killed, which files, what results
KINDS = {
    "examples": ("stats", "stats", None, "cache/examples-*", ("stats.json",)),
    "journal": ("mask", "mask", -20, "mask.safetensors.groups/**/*", ("mask.safetensors",)),
    "delta": ("apply", None, None, "delta.safetensors", ("applied/model.safetensors", "applied/config.json")),
    "kernel store": ("checked", "kernels", None, "kernel_store/*/*", ()),
}
COMMANDS = VERBS | {"checked": ("kernels", "check", "--module", "softmax.py")}


@pytest.fixture(scope="module")
def prepared(given, undisturbed, tmp_path_factory):  # noqa: F811
    """Return, for a kind of file, a folder that has some, their names, the command that reads them, its results."""
    found = {}

    def of(kind):
        if kind not in found:
            reader, maker, killed, files, results = KINDS[kind]
            folder = tmp_path_factory.mktemp("kind") / "made"
            shutil.copytree(given, folder)
            if maker is not None:
                calls, _ = undisturbed(maker)
                attempt(VERBS[maker], folder, None if killed is None else Fault("killed", calls + killed))
            for name in results:
                (folder / name).unlink(missing_ok=True)
            names = sorted(str(path.relative_to(folder)) for path in folder.glob(files) if path.is_file())
            assert names, f"no file of this kind: {sorted(contents(folder))}"
            whole = tmp_path_factory.mktemp("kind") / "whole"
            shutil.copytree(folder, whole)
            ended = attempt(COMMANDS[reader], whole)
            assert ended.code == 0, ended.said
            found[kind] = folder, names, COMMANDS[reader], {name: (whole / name).read_bytes() for name in results}
        return found[kind]

    return of


def counted(kind, prepared, folder, trials):
    """Return how often each outcome came of trials (number of a file, form, number of the draw)."""
    made, names, command, results = prepared(kind)
    outcomes = Counter()
    for file, form, draw in trials:
        name, place = names[file % len(names)], folder / str(sum(outcomes.values()))
        what, ended = outcome(command, place, made, name, form, f"{name} {form} {draw}", results)
        assert what not in ("silent", "crash"), f"{what}: {form} {name} ({draw}): {ended}"
        outcomes[what] += 1
        shutil.rmtree(place)
    return outcomes


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_damage(kind, prepared, tmp_path):
    outcomes = counted(kind, prepared, tmp_path, [(file, form, 0) for file, form in enumerate(FORMS)])
    assert outcomes["same"] < 2, outcomes  # 64 bytes may have been zero already


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_much_damage(kind, prepared, tmp_path):
    _, names, _, _ = prepared(kind)
    counted(kind, prepared, tmp_path, itertools.product(range(len(names)), FORMS, range(50 // len(names) + 1)))
