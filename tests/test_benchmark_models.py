"""The embedded experiment at its test size: what is trained, what is kept apart, what the cache promises."""

import json
import math
from dataclasses import replace

import pytest
import torch

from moe_unlearn import metrics
from moe_unlearn.benchmark import tiny_models, trained_cache
from moe_unlearn.benchmark.tiny_models import SIZES, Settings
from moe_unlearn.data import Example
from moe_unlearn.data.corpus import runs
from moe_unlearn.files import UNFINISHED
from moe_unlearn.model import loading
from tests.support.threads import torch_threads

TINY = replace(SIZES["test"], forget=6, retain=8, holdout=4, epochs=2)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small wait for threads longer than they compute, above all on a busy machine."""
    with torch_threads(1):
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return cache, tiny_models.prepare_experiment("builtin:pydoc", 0, cache, size=TINY)


def same(a, b):
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def weights_of(cache, **keywords):
    return tiny_models.prepare_experiment("builtin:pydoc", 0, cache, size=TINY, **keywords)


@pytest.mark.quick
@pytest.mark.slow
def test_a_cached_model_is_the_trained_one(made, tmp_path, monkeypatch):
    cache, first = made
    fresh = weights_of(tmp_path)
    assert same(fresh.target, first.target) and same(fresh.retrain, first.retrain)
    assert not same(first.target, first.retrain)

    def no_training(*_, **__):
        raise AssertionError("trained although the model is cached")

    monkeypatch.setattr(tiny_models, "train", no_training)
    again = weights_of(cache)
    assert same(again.target, first.target) and same(again.retrain, first.retrain)
    assert again.forget == first.forget and again.retain == first.retain and again.holdout == first.holdout
    monkeypatch.setenv("MOE_UNLEARN_CACHE", str(cache))
    assert same(tiny_models.prepare_experiment("builtin:pydoc", size=TINY).target, first.target)


@pytest.mark.quick
@pytest.mark.parametrize("change", [{"epochs": 1}, {"lr": 1e-3}, {"experts": 4}, {"retain": 7}, {"batch_size": 4}])
@pytest.mark.slow
def test_other_settings_are_other_models(made, change, monkeypatch):
    cache, _ = made
    trained = []
    monkeypatch.setattr(tiny_models, "train", lambda *_, name, **__: trained.append(name))
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tiny_models.prepare_experiment("builtin:pydoc", 0, cache, size=replace(TINY, **change))
    assert trained == ["training target"]
    # an interrupted build leaves nothing behind
    assert len(list(cache.iterdir())) == 2


@pytest.mark.quick
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "add", "manifest"])
def test_a_damaged_entry_is_noticed_and_rebuilt(made, tmp_path, damage):
    def build(folder):
        builds.append(folder)
        (folder / "weights").write_bytes(bytes(100))
        (folder / "more").mkdir()
        (folder / "more" / "config").write_text("{}", encoding="utf-8")

    builds, entry = [], tmp_path / "entry"
    trained_cache.ensure(entry, build)
    trained_cache.ensure(entry, build)
    assert len(builds) == 1
    weights = entry / "weights"
    if damage == "flip":
        weights.write_bytes(bytes(99) + b"\1")
    elif damage == "truncate":
        weights.write_bytes(bytes(99))
    elif damage == "remove":
        (entry / "more" / "config").unlink()
    elif damage == "add":
        (entry / "stray").write_text("", encoding="utf-8")
    else:
        (entry / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.warns(UserWarning, match="damaged .*trained again"):
        trained_cache.ensure(entry, build)
    assert len(builds) == 2 and weights.read_bytes() == bytes(100) and trained_cache.damage(entry) is None
    assert [p.name for p in tmp_path.iterdir()] == ["entry"]


@pytest.mark.quick
@pytest.mark.slow
def test_the_sets_are_apart_and_reproducible():
    first = tiny_models.build_data("builtin:pydoc", 3, SIZES["demo"])
    second = tiny_models.build_data("builtin:pydoc", 3, SIZES["demo"])
    assert first[1:] == second[1:] and first[0].get_vocab() == second[0].get_vocab()
    other = tiny_models.build_data("builtin:pydoc", 4, SIZES["demo"])
    assert other[1] != first[1] and other[0].get_vocab() == first[0].get_vocab()
    forget, retain, holdout = first[1:]
    assert (len(forget), len(retain)) == (SIZES["demo"].forget, SIZES["demo"].retain) and 50 <= len(holdout) <= 64
    sets = [set().union(*(runs(e.input_ids) for e in examples)) for examples in (forget, retain, holdout)]
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]


@pytest.mark.quick
def test_unlearning_sees_a_quarter_of_retain(made):
    _, e = made
    assert len(e.retain_unlearn) == 2 and len(e.retain_eval) == 6 and len(e.retain) == 8
    assert not {tuple(x.input_ids) for x in e.retain_unlearn} & {tuple(x.input_ids) for x in e.retain_eval}
    assert e.evaluation_sets == {"forget": e.forget, "retain": e.retain_eval, "holdout": e.holdout}


@pytest.mark.quick
def test_a_fresh_target_shares_nothing(made):
    _, e = made
    before = {k: v.clone() for k, v in e.target.state_dict().items()}
    copy = e.fresh_target()
    assert same(copy, e.target) and copy.config._experts_implementation == "grouped_mm"
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(1)
    assert all(torch.equal(v, before[k]) for k, v in e.target.state_dict().items())


@pytest.mark.quick
def test_models_depend_on_the_seed_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = tiny_models.tiny_olmoe(300, 5, TINY)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert same(tiny_models.tiny_olmoe(300, 5, TINY), first)
    assert not same(tiny_models.tiny_olmoe(300, 6, TINY), first)
    assert first.get_input_embeddings().weight is first.get_output_embeddings().weight
    layers = [m for m in first.modules() if hasattr(m, "is_transposed") and hasattr(m, "down_proj")]
    assert len(layers) == 3 and all(m.down_proj.dtype == torch.float32 for m in layers)


@pytest.mark.quick
def test_a_cached_folder_is_a_model_folder(made):
    cache, e = made
    (folder,) = cache.glob("target-*")
    model, tokenizer = loading.load_model(folder)
    assert same(model, e.target) and tokenizer.get_vocab() == e.tokenizer.get_vocab()
    assert not list(cache.rglob("*.bin")) and list(folder.glob("*.safetensors"))


@pytest.mark.quick
def test_load_model_names_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        loading.load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no config.json"):
        loading.load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "olmoe"}), encoding="utf-8")
    with pytest.raises(ValueError, match="cannot load a causal language model"):
        loading.load_model(tmp_path)


@pytest.mark.quick
def test_clean_cache_removes_models_only(tmp_path):
    def build(folder):
        (folder / "weights").write_text("1", encoding="utf-8")

    trained_cache.ensure(tmp_path / "target-1", build)
    (tmp_path / f"{UNFINISHED}x").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep", encoding="utf-8")
    assert trained_cache.clean_cache(tmp_path) == 1 and trained_cache.clean_cache(tmp_path / "none") == 0
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.quick
def test_unknown_names_are_errors(tmp_path):
    with pytest.raises(ValueError, match="unknown size 'huge'; expected one of demo, test"):
        tiny_models.prepare_experiment(cache_dir=tmp_path, size="huge")
    with pytest.raises(ValueError, match="unknown corpus 'builtin:x'"):
        tiny_models.prepare_experiment("builtin:x", cache_dir=tmp_path)


@pytest.mark.slow
def test_the_target_knows_what_the_retrained_model_does_not(tmp_path):
    e = tiny_models.prepare_experiment("builtin:pydoc", 0, tmp_path, size="test")
    retrain = metrics.evaluate(e.retrain, e.tokenizer, **e.evaluation_sets, prompt_tokens=8)
    target = metrics.evaluate(
        e.target, e.tokenizer, **e.evaluation_sets, prompt_tokens=8, reference_auc=retrain["minkauc"]
    )
    assert target["verbmem_f"] >= 0.9 and target["verbmem_r"] >= 0.8 and retrain["verbmem_r"] >= 0.8
    assert retrain["verbmem_f"] <= 0.3 and retrain["knowmem_f"] <= 0.2
    assert target["privleak"] == pytest.approx(-100, abs=10) and target["minkauc"] < 0.1
    assert retrain["nll_f"] > 10 * target["nll_f"]
    # documents nobody trained on are alike to the retrained model, whatever their part
    assert retrain["nll_h"] == pytest.approx(retrain["nll_f"], rel=0.2)


@pytest.mark.quick
def test_training_is_silent_without_a_terminal(capfd):
    model = tiny_models.tiny_olmoe(300, 0, TINY)
    rows = [Example([1, 5, 6, 7, 2], [1, 5, 6, 7, 2], 1)] * 3
    first = metrics.nll(metrics.token_scores(model, rows))
    last = tiny_models.train(model, rows, epochs=8, lr=1e-2, batch_size=2)
    assert last < first and math.isfinite(last) and not model.training
    assert capfd.readouterr() == ("", "")


@pytest.mark.quick
def test_the_demo_size_is_the_default():
    assert SIZES["demo"] == Settings() and Settings().layers >= 3 and Settings().unlearn_share == 0.25
