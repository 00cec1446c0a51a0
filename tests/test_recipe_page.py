"""The page of the recipes names every key with its values, and is up to date."""

import pytest

from moe_unlearn.config import Recipe, keys
from tests import recipe_page

pytestmark = pytest.mark.quick
KEYS = {key.name: key for key in keys.table()}


def leaves(values, path=""):
    for key, value in values.items():
        yield from leaves(value, f"{path}{key}.") if isinstance(value, dict) and key != "trainer" else [f"{path}{key}"]


def test_the_page_says_what_the_config_says():
    page = recipe_page.PAGE.read_text(encoding="utf-8")
    assert page == recipe_page.current(page), "run python -m tests.recipe_page"


def test_every_key_is_there_with_a_meaning():
    levers = Recipe.from_dict({"trace": True, "wagle": True, "mollm": True, "adapter": True})
    bound = Recipe.from_dict({"dual": {"retain_loss_eps": 1.0}})  # which MOLLM has no sum for
    adapted = Recipe.from_dict({"adapter": True})
    complete = levers.to_dict() | {"dual": bound.to_dict()["dual"], "adapter": adapted.to_dict()["adapter"]}
    assert set(KEYS) == set(leaves(complete))
    assert not [key.name for key in KEYS.values() if len(key.meaning) < 5]


@pytest.mark.parametrize(
    "name,expected",
    [
        ("steps", "above 0"),
        ("trace.eta", "in (0, 1]"),
        ("trace.cap", "above 1"),
        ("optimizer.betas", "two numbers in [0, 1)"),
        ("data.date", "a date as 2026-11-29"),
        ("retain.router_aux", "auto, off or a number; at least 0"),
        ("mollm.gradients", "auto, compact, factors"),
        ("wagle.accumulation", "above 0"),
        ("data.model", "any"),
    ],
)
def test_values_are_those_that_the_config_refuses_others_for(name, expected):
    assert KEYS[name].values == expected


def test_a_page_without_marks_is_an_error():
    with pytest.raises(ValueError, match="expected <!-- recipes: begin -->"):
        recipe_page.current("# Recipes")
