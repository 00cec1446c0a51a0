"""The embedded experiment from end to end, at its test size; `unlearning`, which it stands on, on a tiny model."""

import dataclasses
import json
import os

import pytest
import torch

from moe_unlearn import benchmark, data
from moe_unlearn.benchmark import Table, tiny_models, unlearning
from moe_unlearn.cli import main
from moe_unlearn.config import Recipe
from moe_unlearn.prepare.reference import model_digest

RUNS = ("trace", "combined")


def without_seconds(path):
    seeds = json.loads((path / "seeds.json").read_text(encoding="utf-8"))
    for runs in seeds["results"].values():
        for values in runs.values():
            assert values.pop("seconds") > 0
    return seeds


@pytest.mark.nightly
def test_the_runs_side_by_side_are_those_one_after_the_other(tmp_path):
    folders = [tmp_path / "two", tmp_path / "one"]
    for processes, folder in zip((2, 1), folders, strict=True):
        benchmark.demo("builtin:pydoc", [0], folder, RUNS, size="test", processes=processes)
    first, second = (without_seconds(folder) for folder in folders)
    assert first == second
    assert list(first["results"]) == ["0"]
    for results in first["results"].values():
        assert list(results) == ["target", "retrain", *RUNS]
        assert results["retrain"]["privleak"] == 0
        assert results["target"]["verbmem_f"] > 0.8 > results["retrain"]["verbmem_f"] + 0.2
        # the demo's settings are not this size's, but the direction is that of forgetting
        assert results["combined"]["nll_f"] > results["target"]["nll_f"] + 0.1
    trajectory = json.loads((folders[0] / "trajectory.json").read_text(encoding="utf-8"))
    assert list(trajectory) == list(RUNS) and all(points[0]["step"] == 0 for points in trajectory.values())
    assert (folders[0] / "report.md").is_file() and (folders[0] / "figures" / "trajectories.svg").is_file()


def test_an_error_in_a_process_is_told_and_nothing_is_written(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["demo", "--corpus", "builtin:nothing", "--out", str(out)]) != 0
    assert "builtin:nothing" in capsys.readouterr().err
    assert not os.path.exists(out)


# ---- unlearning ------------------------------------------------------------------------------------------------

TEXTS = [
    f"the {a} {b} sat on the {a} {c} and looked at the {b}"
    for a in ("red", "old", "new")
    for b in ("cat", "dog", "owl")
    for c in ("mat", "log", "hill")
]
FORGET, RETAIN, HOLDOUT = TEXTS[:4], TEXTS[4:10], TEXTS[10:14]
SMALL = tiny_models.Settings(hidden_size=16, intermediate_size=8, layers=1, heads=2, experts=4, top_k=2, max_length=32)
TOKENIZER = data.train_tokenizer(TEXTS, 280)


def make_model():
    return tiny_models.tiny_olmoe(len(TOKENIZER), seed=3, settings=SMALL)


def make_frozen_model():
    model = make_model()
    model.lm_head.requires_grad_(False)
    return model


def small(name, *overrides):
    return Recipe.load(name, ["steps=3", "batch_size=3", "optimizer.lr=1e-2", *overrides])


def length_of(model, tokenizer, sets):
    assert not model.training
    return {f"length_{side}": sum(map(len, examples)) for side, examples in sets.items()}


def table_of(model=make_model, forget=FORGET, recipes=("npo",), metrics=("nll",), **options):
    made = [small(recipe) if isinstance(recipe, str) else recipe for recipe in recipes]
    return unlearning(model, forget, RETAIN, made, list(metrics), **{"tokenizer": TOKENIZER, **options})


def without(table, column="seconds"):
    return [{key: value for key, value in row.items() if key != column} for row in table]


def test_rows_columns_and_spread():
    model, state = make_model(), torch.random.get_rng_state()
    before, options = model_digest(model), {"recipes": ["graddiff", "npo"], "seeds": (0, 5)}
    table = table_of(model, metrics=["nll", length_of], **options)
    assert model_digest(model) == before and torch.equal(torch.random.get_rng_state(), state)
    assert table.runs == ["target", "graddiff", "npo"] and table.seeds == [0, 5] and len(table) == 6
    assert table.metrics == ["nll_f", "nll_r", "seconds", "length_forget", "length_retain"]
    rows = {(row["run"], row["seed"]): row for row in table}
    assert rows["target", 0] | {"seed": 5} == rows["target", 5] and "seconds" not in rows["target", 0]
    for seed in (0, 5):
        assert rows["graddiff", seed]["nll_f"] > rows["target", seed]["nll_f"]
    assert rows["npo", 0]["nll_f"] != rows["npo", 5]["nll_f"], "a seed changes the batches"
    assert Table.from_json(table.to_json()) == table
    summary, text = table.summary(), table.to_markdown(["nll_f", "length_forget"])
    assert summary["npo"]["nll_f"] == pytest.approx((rows["npo", 0]["nll_f"] + rows["npo", 5]["nll_f"]) / 2)
    header, _, *lines = text.splitlines()
    assert "NLL forget" in header and "length_forget" in header and "NLL retain" not in header
    assert f"{summary['npo']['nll_f']:.2f} ± {summary['npo']['nll_f_sd']:.2f}" in lines[2] and "NPO" in lines[2]
    with pytest.raises(ValueError, match="expected metrics among nll_f, .*; got rouge"):
        table.to_markdown(["rouge"])
    with pytest.raises(ValueError, match="the JSON of a Table"):
        Table.from_json("{}")


@pytest.mark.slow
def test_a_folder_a_function_a_model_and_their_documents_give_the_same_table(tmp_path):
    make_model().save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    expected = without(table_of())
    assert without(table_of(make_model())) == expected
    assert without(table_of(tmp_path, tokenizer=None)) == expected
    assert without(table_of(lambda: (make_model(), TOKENIZER), tokenizer=None)) == expected
    assert without(table_of(forget=[data.Document("", text) for text in FORGET])) == expected
    examples = data.encode([data.Document("", text) for text in FORGET], TOKENIZER, 512)
    assert without(table_of(forget=examples)) == expected


def test_privleak_is_relative_to_the_retrained_model():
    other = tiny_models.tiny_olmoe(len(TOKENIZER), seed=4, settings=SMALL)
    model = make_model()
    table = table_of(
        model, metrics=["privleak"], baselines={"target": model, "retrain": other}, evaluation={"holdout": HOLDOUT}
    )
    (rows,) = table.results.values()
    assert list(rows) == ["target", "retrain", "npo"] and rows["retrain"]["privleak"] == 0
    auc = rows["retrain"]["minkauc"]
    for values in rows.values():
        assert values["privleak"] == pytest.approx(100 * (values["minkauc"] - auc) / auc)
        assert "nll_f" not in values
    with pytest.raises(ValueError, match="two tables have run 'npo' of seed 0"):
        Table.joined([table, table])


def test_micro_batches_and_steps_are_told():
    seen = []
    table_of(recipes=[small("graddiff", "accumulate=2", "batch_size=2")], on_step=seen.append)
    assert [(p.run, p.seed, p.step, p.last) for p in seen] == [("graddiff", 0, i, i == 3) for i in range(4)]
    assert not seen[0].metrics and seen[1].metrics["forget_loss"] != seen[2].metrics["forget_loss"]
    assert seen[3].unlearn_step.steps == 3


def test_the_learning_rate_warms_up_as_in_a_run_of_the_recipe():
    seen = []
    table_of(recipes=[small("graddiff", "steps=5", "optimizer.warmup_steps=4")], on_step=seen.append)
    assert [progress.metrics["lr"] for progress in seen[1:]] == [0.0, 0.0025, 0.005, 0.0075, 0.01]


def test_rows_are_encoded_and_drawn_as_the_recipes_say():
    rows, seen = [], []

    def unlabelled(model, tokenizer, sets):
        rows.extend(sets["forget"])
        return {side: sum(example.labels.count(-100) for example in examples) for side, examples in sets.items()}

    forget = [f"{n} {text} {n}".replace("the", f"the {n}") for n, text in enumerate(FORGET)]
    options = ["data.prompt_tokens=3", "data.max_length=16", "data.forget_rows=2"]
    recipes = [small("graddiff", *options), small("npo", *options[:2])]
    table = table_of(forget=forget, recipes=recipes, metrics=[unlabelled], on_step=seen.append)
    assert all(len(row.input_ids) <= 16 for row in rows), "at most data.max_length tokens"
    assert all(row["forget"] >= 3 * len(FORGET) and row["retain"] == 0 for row in table), "a prompt carries no labels"
    used = {p.run: len(p.unlearn_step.prepared.rows["forget"]) for p in seen}
    assert used["graddiff"] == 2 < used["npo"]
    table_of(forget=forget, recipes=recipes[:1], metrics=[unlabelled], max_length=64)
    assert max(len(row.input_ids) for row in rows) > 16, "max_length of the call comes before the recipes'"


def test_routing_has_not_drifted_where_no_weight_moved():
    """Before and after are counted on the same rows, those that are drawn."""
    still = small("trace", "optimizer.lr=0.0", "data.forget_rows=2", "trace.min_ratio=1.001")
    [_, row] = table_of(recipes=[still], metrics=["routing_drift"])
    assert row["routing_drift"] == 0


def test_an_interrupted_call_loses_only_the_run_in_progress(tmp_path):
    made = []

    def note(progress):
        if progress.step == 0:
            made.append((progress.run, progress.seed))
        if progress.step == 2 and (progress.run, progress.seed) == stop_in:
            raise KeyboardInterrupt

    def run(recipes=("graddiff", "npo"), **options):
        made.clear()
        return table_of(**{"recipes": recipes, "out": tmp_path, "on_step": note, **options})

    stop_in = ("npo", 0)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert made == [("graddiff", 0), ("npo", 0)] and not (tmp_path / "table.json").exists()
    stop_in = None
    table = run()
    assert made == [("npo", 0)]
    assert without(table) == without(table_of(recipes=["graddiff", "npo"]))
    assert Table.from_json((tmp_path / "table.json").read_text(encoding="utf-8")) == table
    assert run() == table and not made, "seconds too: nothing was made again"
    run(seeds=[0, 1])
    assert made == [("graddiff", 1), ("npo", 1)]
    run(recipes=["graddiff", small("npo", "optimizer.lr=2e-2")])
    assert made == [("npo", 0)]
    for change in (
        {"forget": FORGET[:3]},
        {"metrics": ["nll", length_of]},
        {"model": lambda: tiny_models.tiny_olmoe(len(TOKENIZER), seed=4, settings=SMALL)},
        {"model": make_frozen_model},
        {"evaluation": {"retain": HOLDOUT}},
    ):
        run(**change)
        assert made == [("graddiff", 0), ("npo", 0)], change
    for path in (tmp_path / "rows").iterdir():
        path.write_text(path.read_text(encoding="utf-8")[:40], encoding="utf-8")
    with pytest.warns(UserWarning, match="damaged"):
        assert without(run()) == without(table)
    assert made == [("graddiff", 0), ("npo", 0)]


@pytest.mark.quick
@pytest.mark.parametrize(
    "change,message",
    [
        ({"recipes": ["npoo"]}, "no recipe file 'npoo'; shipped recipes: .*npo"),
        ({"recipes": ["npo", "npo"]}, "two recipes are named 'npo'"),
        ({"recipes": "npo"}, "expected a list of recipes; got one"),
        ({"recipes": ["npo"], "baselines": {"npo": None}}, "a recipe and a baseline are both named 'npo'"),
        ({"recipes": [dataclasses.replace(small("npo"), name="target")]}, "both named 'target'"),
        ({"recipes": [], "baselines": {}}, "got neither"),
        (
            {"recipes": ["npo", small("graddiff", "data.prompt_tokens=3")]},
            "'npo' and 'graddiff' encode rows otherwise: data.prompt_tokens is 0 and 3; give both the same",
        ),
        ({"metrics": ["rouge"]}, "expected metrics among nll, .*; got 'rouge'"),
        ({"metrics": ["nll", "nll"]}, "'nll' is asked for twice"),
        ({"metrics": [length_of, length_of]}, "'length_of' is asked for twice"),
        ({"metrics": []}, "at least one metric"),
        ({"metrics": "nll"}, "expected a list of metrics; got one"),
        ({"metrics": ["minkauc"]}, "need unseen documents"),
        ({"metrics": ["privleak"], "evaluation": {"holdout": HOLDOUT}}, "needs the retrained model"),
        ({"forget": []}, "forget: expected at least one"),
        ({"forget": "text"}, "forget: expected a list of texts"),
        ({"forget": [3]}, "forget, row 0: expected a text, a record, a Document or an Example; got int"),
        ({"evaluation": {"holdout": []}}, "holdout: expected at least one"),
        ({"seeds": []}, "expected different seeds"),
        ({"seeds": 3}, "seeds: expected a list of integers; got int 3"),
        ({"recipes": None}, "recipes: expected a list of recipes; got NoneType"),
        ({"recipes": [None]}, "recipe: expected a Recipe, a mapping of its keys, .*; got NoneType"),
        ({"recipes": [{"steps": 0}]}, "steps must be above 0"),
        ({"recipes": {"steps": 1}}, "expected a list of recipes; got one"),
        ({"metrics": 3}, "metrics: expected a list of names and functions; got int"),
        ({"evaluation": [HOLDOUT]}, "evaluation: expected a mapping by name; got list"),
        ({"baselines": ["target"]}, "baselines: expected a mapping by name; got list"),
        ({"seeds": [1, 1]}, "expected different seeds"),
    ],
)
def test_bad_input_is_told_before_any_work(change, message):
    def work():
        raise AssertionError("a model was made")

    asked = {"forget": FORGET, "retain": RETAIN, "recipes": ["npo"], "metrics": ["nll"], **change}
    with pytest.raises((ValueError, TypeError), match=message):
        unlearning(work, **asked, tokenizer=TOKENIZER)


def test_bad_models_and_metrics():
    kept = make_model()
    with pytest.raises(ValueError, match="gave one model twice"):
        table_of(lambda: kept)
    with pytest.raises(TypeError, match="expected a model, a folder or a function; got int"):
        table_of(3)
    with pytest.raises(TypeError, match="expected the function to make a model; got str"):
        table_of(lambda: "model")
    with pytest.raises(ValueError, match="expected a tokenizer too"):
        table_of(tokenizer=None)
    with pytest.raises(ValueError, match="is not a folder"):
        table_of("nowhere")
    with pytest.raises(ValueError, match="the forget and retain sets overlap: 1 of 2 forget examples"):
        table_of(forget=[FORGET[0], RETAIN[0]])
    with pytest.raises(ValueError, match="retain: no example has a token to predict"):
        unlearning(make_model, FORGET, [data.Example([5], [5], 0)], ["npo"], ["nll"], tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="text_metric: expected a dict of name -> number; got 'a': 'b'"):
        table_of(metrics=[text_metric])
    with pytest.raises(ValueError, match="names 'nll_f', which is there already"):
        table_of(metrics=["nll", lambda *arguments: {"nll_f": 1.0}])


def text_metric(model, tokenizer, sets):
    return {"a": "b"}
