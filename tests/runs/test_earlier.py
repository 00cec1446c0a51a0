"""Five requests in sequence: what earlier ones forgot stays forgotten, with its rows at hand and without."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moe_unlearn import delta, metrics
from moe_unlearn.benchmark import tiny_models
from moe_unlearn.cli import main
from moe_unlearn.config import Recipe
from moe_unlearn.model.saving import save_model
from moe_unlearn.runs.run import Run
from moe_unlearn.step import UnlearnStep
from tests.support.command_line import arguments, saved

SETTINGS = tiny_models.Settings(
    forget=10,
    retain=10,
    holdout=4,
    max_length=24,
    vocab_size=384,
    hidden_size=48,
    intermediate_size=24,
    layers=2,
    experts=8,
    top_k=2,
    lr=8e-3,
    epochs=90,
    batch_size=20,
)
REQUESTS = 5
GONE = 2.0  # nats a token: the trained model has some 0.1, the end of a request 3 and more
RECIPE = {
    "forget": {"objective": "uce"},
    "retain": {"objective": "kl", "alpha": 2.0},
    "optimizer": {"lr": 2e-3},
    "batch_size": 8,
    "retain_per_forget": 9.0,
}


def nll(model, examples):
    return metrics.nll(metrics.token_scores(model, examples))


@pytest.fixture(scope="module")
def trained():
    """A tiny model that knows all documents by heart, and the documents of five requests."""
    tokenizer, forget, retain, _ = tiny_models.build_data("builtin:pydoc", 0, SETTINGS)
    model = tiny_models.tiny_olmoe(len(tokenizer), 0, SETTINGS)
    tiny_models.train(
        model, forget + retain, epochs=SETTINGS.epochs, lr=SETTINGS.lr, batch_size=SETTINGS.batch_size, name="target"
    )
    size = len(forget) // REQUESTS
    groups = [forget[i * size : (i + 1) * size] for i in range(REQUESTS)]
    return SimpleNamespace(model=model, tokenizer=tokenizer, groups=groups, retain=retain)


def request(model, made, number, *, at_hand, cache):
    """Make a request on the model as it is; return the first step's retain loss, a KL to the request's own start."""
    earlier = sum(made.groups[:at_hand], [])
    run = Run(model, made.tokenizer, Recipe.from_dict(RECIPE), made.groups[number], made.retain, earlier=earlier)
    step, losses = UnlearnStep(model, run.recipe), []
    step.prepare(run.batches("forget"), run.batches("retain"), cache_dir=cache)
    for i in range(60):
        losses.append(step(**{f"{side}_batch": batch for side, batch in run.micro_batch(i).items()})["retain_loss"])
        if i % 5 == 4 and nll(model, made.groups[number]) > 1.5 * GONE:
            break
    step.close()
    return losses[0]


@pytest.mark.parametrize("at_hand", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_five_requests_leave_the_earlier_ones_forgotten_and_their_deltas_lead_there_and_back(
    trained, at_hand, tmp_path
):
    model = tiny_models.tiny_olmoe(len(trained.tokenizer), 0, SETTINGS)
    model.load_state_dict(trained.model.state_dict())
    assert max(nll(model, group) for group in trained.groups) < 0.5
    folders = [tmp_path / f"after {i}" for i in range(REQUESTS + 1)]
    save_model(model, folders[0], trained.tokenizer)
    levels = []
    for i in range(REQUESTS):
        before = [nll(model, group) for group in trained.groups[:i]]
        # a reference of any earlier model would begin at what that request has changed
        assert request(model, trained, i, at_hand=i * at_hand, cache=tmp_path / "cache") < 0.02
        save_model(model, folders[i + 1], trained.tokenizer)
        delta.write(folders[i], folders[i + 1], tmp_path / f"{i}.delta")
        levels.append((before, [nll(model, group) for group in trained.groups[: i + 1]]))
    assert nll(model, trained.retain) < 1.0
    for before, after in levels:
        assert min(after) > GONE, f"what a request forgot is back: {levels}"
        if at_hand:
            assert all(abs(own - former) < 0.5 * former for own, former in zip(after, before, strict=False))
    for verb, order in ((delta.apply, range(REQUESTS)), (delta.revert, reversed(range(REQUESTS)))):
        last: Path | None = None
        for i in order:
            start = folders[0] if verb is delta.apply else folders[-1]
            made = tmp_path / f"{verb.__name__} {i}"
            verb(start if last is None else last, tmp_path / f"{i}.delta", made)
            last = made
        end = folders[-1] if verb is delta.apply else folders[0]
        assert (last / "model.safetensors").read_bytes() == (end / "model.safetensors").read_bytes()


@pytest.mark.quick
@pytest.mark.parametrize("changed", [{"retain": {"objective": "nll"}}, {"reference": "base"}])
def test_what_would_teach_earlier_rows_again_is_refused(changed):
    with pytest.raises(ValueError, match="data.earlier is held as the model at the start .* needs retain.obj"):
        Recipe.from_dict(RECIPE | {"data": {"earlier": ["a.jsonl"]}} | changed)
    assert Recipe.from_dict(RECIPE | {"data": {"earlier": ["a.jsonl"]}}).data.earlier == ["a.jsonl"]


def test_earlier_rows_join_those_drawn_of_the_retain_set(trained):
    recipe = Recipe.from_dict(RECIPE | {"data": {"retain_rows": 3}})
    run = Run(trained.model, trained.tokenizer, recipe, trained.groups[1], trained.retain, earlier=trained.groups[0])
    assert len(run.pairs.retain) == 3 + len(trained.groups[0])
    assert run.pairs.retain[3:] == trained.groups[0] and torch.is_tensor(run.batches("retain")[0]["input_ids"])


def test_the_command_line_takes_several_sources_and_what_deployment_rounds_to(tmp_path, capsys):
    saved(tmp_path)
    for name in ("first", "other"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"the {name} of all the rows"}), encoding="utf-8")
    earlier = [str(tmp_path / f"{name}.jsonl") for name in ("first", "other")]
    settings = ("steps=1", "batch_size=3", "optimizer.lr=1e-3", "data.max_length=48", "survive=int4")

    def run(out, *more):
        own = [*arguments(tmp_path), "--out", str(out), "--no-eval", "--set", *settings]
        return main(["run", "kl_min", *own, "--earlier", *earlier, *more])

    assert run(tmp_path / "planned", "--dry-run") == 0
    assert "survive: after the last step" in capsys.readouterr().out and not (tmp_path / "planned").exists()
    assert run(tmp_path / "out") == 0
    assert "moved within reach of int4" in capsys.readouterr().out
    assert Recipe.load(tmp_path / "out" / "recipe.yaml").data.earlier == earlier
    assert {"earlier 1", "earlier 2"} <= json.loads((tmp_path / "out" / "data.json").read_text("utf-8")).keys()
    (tmp_path / "other.jsonl").write_text((tmp_path / "forget.jsonl").read_text("utf-8"), encoding="utf-8")
    assert run(tmp_path / "again") == 2
    assert "forget examples stand in data.earlier too" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
