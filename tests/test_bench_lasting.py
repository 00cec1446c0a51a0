"""The frontier of deep forgetting is resumed where it was, and its section says how far each run is from the goal."""

import inspect
from types import SimpleNamespace

import pytest

from benchmarks import lasting
from benchmarks.journal import Journal, read
from moe_unlearn.config import Recipe
from moe_unlearn.runs.run import Run

pytestmark = pytest.mark.quick
NEAR = {
    "nll_f": 5.0,
    "nll_r": 0.3,
    "nll_h": 5.1,
    "verbmem_f": 0.06,
    "verbmem_r": 0.97,
    "knowmem_f": 0.02,
    "knowmem_r": 0.96,
    "minkauc": 0.48,
}
MODELS = {
    "target": NEAR | {"verbmem_f": 1.0, "knowmem_f": 0.9, "verbmem_r": 1.0, "knowmem_r": 1.0, "minkauc": 0.0},
    "retrain": NEAR | {"verbmem_f": 0.02, "minkauc": 0.5},
}


def recorded(folder, **found):
    """The lines of runs of seed 0, by name."""
    journal = Journal(folder / lasting.JOURNAL)
    for name, values in (MODELS | found).items():
        journal.write("run", name=name, seed=0, metrics=values)
    return read(journal.path)


def test_the_distance_to_the_goal_is_0_where_it_is_reached(tmp_path):
    found = lasting.points(recorded(tmp_path, level=NEAR, mollm=NEAR | {"verbmem_r": 0.90, "minkauc": 0.3}))
    ends = found["target"][0], found["retrain"][0]
    assert found["level"][0]["privleak"] == pytest.approx(-4)
    assert not any(lasting.missed(found["level"][0], *ends).values())
    far = lasting.missed(found["mollm"][0], *ends)
    assert {name for name, value in far.items() if value} == {"privleak", "verbmem_r"}
    assert (far["privleak"], far["verbmem_r"]) == pytest.approx((30, 0.05))


def test_runs_that_have_a_line_are_not_made_again(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(lasting, "measured", lambda name, seed: made.append((name, seed)) or dict(NEAR))
    arguments = ["--out", str(tmp_path), "--runs", "level", "mollm", "--seeds", "0", "1"]
    lasting.main([*arguments, "--minutes", "0"])
    assert made == []
    recorded(tmp_path, level=NEAR)
    lasting.main(arguments)
    assert made == [("mollm", 0), *((name, 1) for name in ("target", "retrain", "level", "mollm"))]
    lasting.main(arguments)
    assert len(made) == 5


def test_level_steers_by_its_unseen_documents(monkeypatch):
    """They were given as what earlier requests forgot, which has another place in the arguments of a run."""

    class Stopped(Exception):
        pass

    def noted(*given, **named):
        raise Stopped(inspect.signature(Run).bind(*given, **named).arguments)

    monkeypatch.setattr(lasting, "Run", noted)
    monkeypatch.setattr(lasting, "unseen_of", lambda seed, settings: ["unseen"])
    made = SimpleNamespace(
        seed=0, settings=None, tokenizer=None, forget=["forget"], retain_unlearn=["retain"], fresh_target=lambda: None
    )
    with pytest.raises(Stopped) as found:
        lasting.unlearned(made, lasting.LEVERS["level"])
    [given] = found.value.args
    assert given["unseen"] == ["unseen"] and "earlier" not in given


def test_the_section_names_what_is_missed_and_says_whether_a_seed_was_kept_back(tmp_path):
    assert lasting.generated(tmp_path) == "No run is recorded yet."
    recorded(tmp_path, level=NEAR, mollm=NEAR | {"knowmem_f": 0.4})
    lasting.write(tmp_path)
    text = lasting.generated(tmp_path)
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")}
    assert rows["level"].endswith("| none |") and rows["mollm"].endswith("| knowmem_f |")
    assert "no seed was kept back" in text
    Journal(tmp_path / lasting.JOURNAL).write("run", name="target", seed=8, metrics=MODELS["target"])
    lasting.write(tmp_path)
    assert "no setting was chosen by 8" in lasting.generated(tmp_path)


def test_every_lever_is_a_recipe():
    for name, lever in lasting.LEVERS.items():
        assert Recipe.load(lever.recipe, [*lasting.COMMON, *lever.overrides]).mollm is not None, name
