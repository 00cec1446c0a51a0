"""Settings can be found: the recipes, their keys with origin and range, their schema; and recipes extend each other."""

import json
import sys

import pytest
import yaml

from moe_unlearn.cli import main
from moe_unlearn.config import Recipe, keys, models, shipped
from moe_unlearn.config.files import FOLDER
from moe_unlearn.config.values import parse

pytestmark = pytest.mark.quick
SCHEMA = keys.json_schema()
KINDS = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}


@pytest.fixture
def write(tmp_path):
    """Write a recipe file and return its path."""

    def written(file, **values):
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return str(path)

    return written


def told(capsys, *words, code=0):
    """What the command line prints: its output, or with another code its error."""
    assert main(words) == code
    output = capsys.readouterr()
    return output.err if code else output.out


def fits(value, schema) -> bool:
    """Whether a value is as a schema says, by those words of JSON schema that ours has."""
    if "anyOf" in schema and not any(fits(value, one) for one in schema["anyOf"]):
        return False
    kind = schema.get("type")
    if kind == "null":
        return value is None
    if kind is not None and (not isinstance(value, KINDS[kind]) or isinstance(value, bool) and kind != "boolean"):
        return False
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        return value.keys() <= known.keys() and all(fits(own, known[key]) for key, own in value.items())
    if isinstance(value, list) and "items" in schema:
        return all(fits(own, schema["items"]) for own in value)
    rules = {
        "enum": lambda allowed: value in allowed,
        "const": lambda only: value is only,
        "minimum": lambda low: value >= low,
        "exclusiveMinimum": lambda low: value > low,
        "maximum": lambda high: value <= high,
        "exclusiveMaximum": lambda high: value < high,
    }
    return all(holds(schema[rule]) for rule, holds in rules.items() if rule in schema)


def test_every_recipe_is_listed_with_a_line(capsys):
    lines = told(capsys, "recipes").splitlines()
    assert [line.split()[0] for line in lines] == [*shipped()]
    assert all(len(line.split()) > 3 for line in lines)
    assert json.loads(told(capsys, "recipes", "--json")).keys() == {*shipped()}


def test_show_has_every_key_with_value_origin_range_and_meaning(capsys, monkeypatch):
    words = ["rmu", "--model", "olmoe-1b-7b", "--set", "wagle.keep=0.5", "optimizer.lr=3e-5"]
    found = json.loads(told(capsys, "show", *words, "--json"))
    recipe = Recipe.load("rmu", ["wagle.keep=0.5"])
    off = {name for name in keys.section_meanings() if getattr(recipe, name) is None}
    assert {"trace", "mollm", "dual", "adapter"} <= off
    assert found.keys() == off | {key.name for key in keys.table() if key.name.partition(".")[0] not in off}
    origins = {name: found[name]["origin"] for name in ("steps", "forget.steering", "optimizer.lr", "forget.beta")}
    assert [*origins.values()] == ["recipe rmu", "model olmoe-1b-7b", "--set", "default"]
    assert found["forget.steering"]["value"] == 3000 and found["wagle.keep"]["values"] == "in (0, 1]"
    assert found["trace"]["value"] is None and "TRACE" in found["trace"]["meaning"]
    switched = json.loads(told(capsys, "show", "npo", "--set", "router=frozen", "trace=true", "--json"))
    assert [switched[name]["origin"] for name in ("router.mode", "trace.cap")] == ["--set", "default"]
    monkeypatch.setenv("COLUMNS", "300")  # no meaning is broken into lines
    lines = told(capsys, "show", *words).splitlines()
    [rate] = [line for line in lines if line.startswith("optimizer.lr ")]
    assert rate.split()[1:3] == ["3e-05", "--set"] and "learning rate (at least 0" in rate


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("lr=1e-4", "'optimizer.lr'"),
        ("forget.lr=1", "'optimizer.lr'"),
        ("gamma=1", "'forget.gamma' or 'wagle.gamma'"),
        ("step=3", "'steps'"),
        ("trace.ets=0.5", "'trace.eta'"),
    ],
)
def test_a_key_that_stands_elsewhere_or_is_misspelled_is_named_in_full(given, meant, capsys):
    assert f"did you mean {meant}?" in told(capsys, "show", "npo", "--set", given, code=2)


def test_a_recipe_extends_another_and_its_own_keys_win(write, capsys):
    write("base.yaml", extends="rmu", name="base", steps=7, forget={"steering": 5.0})
    child = write("sub/child.yaml", extends="../base.yaml", batch_size=2, retain={"alpha": 3.0})
    made = Recipe.load(child, ["seed=4"], model="olmoe-1b-7b")
    assert (made.name, made.steps, made.batch_size, made.seed) == ("base", 7, 2, 4)
    assert (made.forget.objective, made.forget.steering, made.forget.layer) == ("rmu", 5.0, 7)
    assert made.retain.alpha == 3.0
    assert Recipe.load(write("same.yaml", extends="npo")) == Recipe.load("npo")
    found = json.loads(told(capsys, "show", child, "--model", "olmoe-1b-7b", "--json"))
    assert found["steps"]["origin"] == "recipe ../base.yaml" and found["batch_size"]["origin"] == f"recipe {child}"
    assert found["forget.layer"]["origin"] == "recipe rmu" and found["forget.steering"]["value"] == 5.0


def test_a_switch_that_a_child_turns_off_has_the_child_as_its_origin(write, capsys):
    child = write("child.yaml", extends="trace", trace=None)
    row = json.loads(told(capsys, "show", child, "--json"))["trace"]
    assert row["value"] is None and row["origin"] == f"recipe {child}"


@pytest.mark.parametrize(
    ("base", "says"),
    [
        ("b.yaml", "extends leads back to a.yaml"),
        ("nowhere.yaml", "extends: no recipe file"),
        (3, "a.yaml: extends must name a shipped recipe or a file beside this one; got 3"),
    ],
)
def test_what_cannot_be_extended_is_refused(base, says, write, capsys):
    write("b.yaml", extends="a.yaml" if base == "b.yaml" else "npo")
    error = told(capsys, "show", write("a.yaml", extends=base), code=2)
    assert says in error and len(error.splitlines()) == 1


def test_a_circle_through_a_folder_is_told_in_few_words(write, capsys):
    circle = write("sub/a.yaml", extends="../sub/a.yaml")
    error = told(capsys, "show", circle, code=2)
    assert "extends leads back to ../sub/a.yaml" in error and error.count("->") == 1


def test_the_origin_of_a_mapping_is_that_of_its_keys(write, capsys):
    child = write("child.yaml", extends="npo", trainer={"logging_steps": 2})
    for more, origin in (([], f"recipe {child}"), (["--set", "trainer.save_steps=3"], f"recipe {child}, --set")):
        assert json.loads(told(capsys, "show", child, "--json", *more))["trainer"]["origin"] == origin


@pytest.mark.parametrize("name", shipped())
def test_the_schema_takes_every_shipped_recipe(name):
    for values in (parse(FOLDER / f"{name}.yaml", name), Recipe.load(name).to_dict()):
        assert fits(values, SCHEMA)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 1},
        {"steps": 0},
        {"steps": "x"},
        {"forget": {"objective": "x"}},
        {"trace": {"eta": 2}},
        {"trace": False},
        {"optimizer": {"betas": ["x"]}},
        {"optimizer": None},
        {"data": {"packing": 1}},
    ],
)
def test_the_schema_refuses_what_the_config_refuses(wrong):
    assert not fits(wrong, SCHEMA)
    with pytest.raises(ValueError):
        Recipe.from_dict(wrong)


def test_the_schema_that_is_printed_is_valid_where_jsonschema_is_there(capsys):
    assert json.loads(told(capsys, "schema")) == SCHEMA
    known = pytest.importorskip("jsonschema").Draft202012Validator
    known.check_schema(SCHEMA)
    assert all(known(SCHEMA).is_valid(Recipe.load(name).to_dict()) for name in shipped())


def test_completion_without_its_library_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    assert 'pip install "moe-unlearn[completion]"' in told(capsys, "completion", "fish", code=2)


def test_show_refuses_a_model_that_nobody_knows(capsys):
    with pytest.raises(SystemExit):
        main(["show", "rmu", "--model", "nothing"])
    error = capsys.readouterr().err
    assert all(name in error for name in models())
