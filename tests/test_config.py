"""Recipes: the shipped ones, round trips, and errors that name the key."""

import dataclasses
import types

import pytest

from moe_unlearn import config
from moe_unlearn.config import Recipe
from moe_unlearn.config.values import bytes_of

pytestmark = pytest.mark.quick

PROCEDURES = {"trace", "wagle", "mollm", "combined"}
BASELINES = {
    "ga",
    "graddiff",
    "npo",
    "simnpo",
    "idk_dpo",
    "level",
    "rmu",
    "kl_min",
    "seuf",
    "wga",
    "satimp",
    "ceu",
    "undial",
    "altpo",
    "pdu",
}


def test_shipped_recipes():
    assert set(config.shipped()) >= PROCEDURES | BASELINES


@pytest.mark.parametrize("name", sorted(PROCEDURES | BASELINES))
def test_a_shipped_recipe_loads_and_round_trips(name, tmp_path):
    recipe = Recipe.load(name)
    assert recipe.name == name
    levers = {lever for lever in ("trace", "wagle", "mollm") if getattr(recipe, lever) is not None}
    assert levers == {"combined": {"trace", "wagle", "mollm"}, "level": {"mollm"}}.get(name, {name} & PROCEDURES)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.load(path) == recipe


def test_overrides():
    recipe = Recipe.load("npo", ["optimizer.lr=1e-3", "trace.eta=0.7", "steps=3", "scope.kind=all"])
    assert recipe.optimizer.lr == 1e-3 and recipe.steps == 3
    assert recipe.trace == config.Trace(eta=0.7)
    assert Recipe.load("combined", ["mollm=null"]).mollm is None
    assert Recipe.load("npo", ["wagle=true"]).wagle == config.Wagle()
    assert Recipe.load("trace", ["trace.cap=null"]).trace.cap is None
    assert Recipe.load("npo", ["optimizer.betas=[0.8, 0.9]"]).optimizer.betas == [0.8, 0.9]


@pytest.mark.parametrize(
    "override,message",
    [
        ("forget.betta=1", r"unknown recipe key 'forget.betta'; did you mean 'forget.beta'"),
        ("tracee.eta=1", r"unknown recipe key 'tracee'; did you mean 'trace'"),
        ("steps=many", r"steps must be int; got 'many'"),
        ("steps=1.5", r"steps must be int; got 1.5"),
        ("steps=true", r"steps must be int; got True"),
        ("steps=0", r"steps must be above 0; got 0"),
        ("optimizer.lr=fast", r"optimizer.lr must be a number; got 'fast'"),
        ("optimizer.lr=.nan", r"optimizer.lr must be finite"),
        ("optimizer.lr=-1", r"optimizer.lr must be at least 0"),
        ("optimizer.betas=[0.9]", r"optimizer.betas must be two numbers"),
        ("optimizer.betas=[a, b]", r"optimizer.betas\[0\] must be a number"),
        ("forget=npo", r"forget must be a mapping of keys; got 'npo'"),
        ("forget.objective=npoo", r"forget.objective must be one of .*npo"),
        ("router=frosen", r"router.mode must be one of free, frozen.*; got 'frosen'"),
        ("trace.eta=2", r"trace.eta must be in \(0, 1\]; got 2"),
        ("trace.cap=1", r"trace.cap must be above 1"),
        ("scope.parameters=[a]", r"goes with scope.kind 'parameters'"),
        ("scope.kind=experts", r"needs trace"),
        ("forget.ignore_first_n_answer_tokens=-1", r"ignore_first_n_answer_tokens must be at least 0; got -1"),
        ("retain.objective=embed_diff", r"RMU's"),
        ("data.date=2026-11-29", r"data.date is for a chat template and needs data.chat_template=true"),
        ("data={chat_template: true, date: now}", r"data.date must be a date as 2026-11-29; got 'now'"),
        ("data.seam=apart", r"data.seam must be one of joint, separate; got 'apart'"),
        ("optimizer.lr=1e38", r"optimizer.lr must be at most 1000; got 1e\+38"),
        ("optimizer.eps=0", r"optimizer.eps must be above 0; got 0"),
        ("accumulate=100000000000000000000", r"accumulate must be at most 2147483647; got 1000"),
        ("seed=-1", r"seed must be at least 0; got -1"),
        ("seed=4294967296", r"seed must be at most 4294967295; got 4294967296"),
        ("retain_per_forget=1e300", r"retain_per_forget must be at most 1000; got 1e\+300"),
        ("data.forget=''", r"data.forget is empty, which is no source"),
        ("steps=" + "[" * 5000, r"override 'steps=\[{194}\.\.\.': the value is not YAML"),
        ("noequals", r"an override looks like"),
        ("steps=[1, 2", r"override 'steps=\[1, 2': the value is not YAML"),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(ValueError, match=message):
        Recipe.load("npo", [override])


def test_a_date_is_one_as_yaml_reads_it_too():
    recipe = Recipe.load("npo", ["data.chat_template=true", "data.date=2026-11-29"])
    assert recipe.data.date == "2026-11-29" and Recipe.from_dict(recipe.to_dict()) == recipe


def test_trace_needs_weighable_tokens():
    with pytest.raises(ValueError, match="trace weighs retain tokens"):
        Recipe.load("trace", ["retain.objective=none"])


HOSTILE = {
    "python tag": "name: !!python/object/apply:os.system ['true']",
    "alias bomb": "name: &a [x]\nsteps: *a",
    "duplicate key": "steps: 1\nsteps: 2",
    "list": "- 1\n- 2",
    "text": "just text",
    "empty": "",
    "broken": "a: [1, 2",
    "deep": "[" * 5000,
    "binary": "\x00\x01",
    "unknown type": "trace: 5",
    "nested null": "forget: null",
    "int key": "5: 6",
    "tab": "a:\n\t- b",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError):
        Recipe.load(path)


def test_missing_file_names_the_shipped_recipes(tmp_path):
    with pytest.raises(ValueError, match="no recipe file 'nope.yaml'; shipped recipes: altpo, ceu, combined"):
        Recipe.load("nope.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ValueError, match="not a YAML recipe"):
        Recipe.load(tmp_path / "latin.yaml")


def test_a_recipe_is_made_of_whatever_describes_one(tmp_path):
    recipe = Recipe.load("combined", ["steps=3"])
    (tmp_path / "own.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    given = (recipe, recipe.to_dict(), types.MappingProxyType(recipe.to_dict()), tmp_path / "own.yaml")
    assert [Recipe.of(one) for one in given] == [recipe] * 4
    assert Recipe.of(str(tmp_path / "own.yaml")) == recipe and Recipe.of("npo").name == "npo"
    for wrong in (None, 3, ["npo"]):
        with pytest.raises(TypeError, match=f"expected a Recipe, .* shipped recipe; got {type(wrong).__name__}"):
            Recipe.of(wrong)
    with pytest.raises(ValueError, match="unknown recipe key 'step'; did you mean 'steps'"):
        Recipe.of({"step": 3})


def test_recipes_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().steps = 5


@pytest.mark.parametrize(
    ("given", "bytes_"), [(1e16, 10**16), (2.5e18, 25 * 10**17), ("512MiB", 2**29), (1.5, 1), ("0.5GB", 5 * 10**8)]
)
def test_an_amount_of_memory_may_be_large(given, bytes_):
    assert bytes_of("wagle.memory", given) == bytes_
    assert Recipe.from_dict({"wagle": {"memory": given}}).wagle.memory == given
