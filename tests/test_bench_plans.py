"""The page of plans of published models: what the record says; cells of the record are planned again."""

import random

import pytest

from benchmarks import plans
from moe_unlearn.config import Recipe, shipped
from moe_unlearn.runs.planning import SIZES, plan_of_config
from tests.support.models import TINY_MODELS

RECORD = plans.recorded()
ROWS = [(model, row) for model in RECORD for row in RECORD[model]]
SAMPLE = random.Random(1).sample(range(len(ROWS)), 1)


@pytest.mark.quick
def test_the_page_is_that_of_the_record():
    assert plans.PAGE.read_text(encoding="utf-8") == plans.page(RECORD), "run python -m benchmarks.plans"
    for rows in RECORD.values():
        assert sorted(name for row in rows for name in row["recipes"]) == sorted(shipped())


@pytest.mark.parametrize(
    ("model", "row"),
    [pytest.param(*found, marks=[] if i in SAMPLE else pytest.mark.nightly) for i, found in enumerate(ROWS)],
    ids=[f"{model}-{row['of']}" for model, row in ROWS],
)
def test_a_row_is_what_is_planned_now(model, row, measurable_memory):
    plan = plan_of_config(model, Recipe.load(row["of"], model=model), advise=False)
    assert plan.peak == pytest.approx(sum(row["memory"].values()), rel=0.01)
    for size in SIZES:
        assert plan.fits_on(size) == row["fits"][f"{size:g}"]
        assert sum(plan.on(size).values()) == pytest.approx(row["on"][f"{size:g}"], rel=0.01)


def test_recipes_of_one_kind_have_one_plan(tmp_path):
    TINY_MODELS["olmoe"](vocab_size=256, hidden_size=64).config.save_pretrained(tmp_path)
    recipes = [Recipe.load(name, ["data.max_length=16"]) for name in ("seuf-rwku", "seuf-wmdp")]
    assert plans.sizes(recipes[0]) == plans.sizes(recipes[1]) != plans.sizes(Recipe.load("seuf"))
    made = [plan_of_config(tmp_path, recipe, advise=False) for recipe in recipes]
    assert made[0].memory == made[1].memory and made[0].paths == made[1].paths


@pytest.mark.quick
def test_a_cell_names_the_options_that_make_a_run_fit():
    row = {"recipes": ["npo"], "memory": {"weights": 3 * plans.GIB, "mask": plans.GIB}, "on": {"80": 0, "141": 0},
           "masking": {"80": False, "141": False}, "fits": {"80": False, "141": True},
           "remedies": {"80": [
               r"it fits with --set checkpointing=on scope.kind=parameters 'scope.parameters=[''layers\.(3)\..*'']'",
               "or on several devices with --mesh fsdp=4"]}}  # fmt: skip
    line = plans.page({"m": [row]}).splitlines()[-1]
    top = "experts of the top quarter of the layers"
    answer = f"no: `checkpointing=on`, {top}; or `--mesh fsdp=4`"
    assert line == f"| `npo` | 4.0 | 3.0 |  |  |  | 1.0 |  | {answer} | yes |"
    nothing = row | {"remedies": {"80": ["no knob of the recipe makes it fit on one device"]}}
    assert "| no, with no option | yes |" in plans.page({"m": [nothing]})
