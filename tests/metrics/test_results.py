"""The files of an evaluation, the cache, and what a reference run is checked against."""

import json
import math

import pytest
import torch

from moe_unlearn.metrics import results
from moe_unlearn.metrics.results import FORMAT, Evaluation, ReferenceRun, mean_result

pytestmark = pytest.mark.quick


class Counter:
    """A computation that says how often it was made."""

    def __init__(self, value=0.5):
        self.calls, self.value = 0, value

    def __call__(self):
        self.calls += 1
        return {"agg_value": self.value, "value_by_index": {"0": {"score": self.value}}}


def test_the_mean_leaves_out_what_has_no_value():
    result = mean_result([{"prob": 0.5}, {"prob": None}, {"prob": [0.0, 0.5]}], "prob")
    assert result["agg_value"] == 0.375 and list(result["value_by_index"]) == ["0", "1", "2"]
    with pytest.raises(ValueError, match="got none of 1"):
        mean_result([{"prob": None}], "prob")


def test_three_files_and_strict_json(tmp_path, random_model, tokenizer):
    run = Evaluation("MUSE", random_model, tokenizer, {"cut": 3}, out=tmp_path / "run")
    run.add("b", [1], Counter(math.nan))
    assert run.summary == {"b": None}
    run.add("a", [2], Counter(0.25))
    names = {"MUSE_EVAL.json", "MUSE_SUMMARY.json", "MUSE_SETTINGS.json"}
    assert {p.name for p in (tmp_path / "run").iterdir()} == names

    def read(suffix):
        def refuse(constant):
            raise AssertionError(constant)

        return json.loads((tmp_path / "run" / f"MUSE_{suffix}.json").read_text(encoding="utf-8"), parse_constant=refuse)

    assert read("SUMMARY") == {"a": 0.25, "b": None}
    assert read("EVAL")["a"] == Counter(0.25)() and read("EVAL")["b"]["value_by_index"]["0"]["score"] is None
    assert read("SETTINGS")["settings"] == {"cut": 3} and set(read("SETTINGS")["data"]) == {"a", "b"}


def test_a_result_is_computed_once_for_a_model_its_data_and_settings(tmp_path, random_model, tokenizer):
    def evaluate(compute, model=random_model, data=("text",), settings=None, key="a", name="MUSE"):
        run = Evaluation(name, model, tokenizer, settings or {"cut": 3}, cache_dir=tmp_path)
        return run.add(key, list(data), compute)

    count = Counter(1 / 3)
    first = evaluate(count)
    assert evaluate(count) == first and count.calls == 1
    evaluate(count, data=["other"])
    evaluate(count, settings={"cut": 4})
    evaluate(count, key="b")
    evaluate(count, name="TOFU")
    with torch.no_grad():
        random_model.lm_head.weight[0, 0] += 1e-3
    evaluate(count)
    assert count.calls == 6
    with torch.autocast("cpu", torch.bfloat16):
        evaluate(count)
    evaluate(count)
    assert count.calls == 7


def test_the_first_rank_alone_hashes_the_model(tmp_path, random_model, tokenizer, monkeypatch):
    hashed = Counter()
    monkeypatch.setattr(results, "model_digest", lambda model: str(hashed()))
    for first in (True, False):
        monkeypatch.setattr(results, "is_first", lambda first=first: first)
        Evaluation("MUSE", random_model, tokenizer, {}, cache_dir=tmp_path)
    assert hashed.calls == 1


def test_a_damaged_cache_file_is_computed_again(tmp_path, random_model, tokenizer):
    count = Counter()
    Evaluation("MUSE", random_model, tokenizer, {}, cache_dir=tmp_path).add("a", [], count)
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text(encoding="utf-8").replace("0.5", "0.9", 1), encoding="utf-8")
    with pytest.warns(UserWarning, match="damaged"):
        again = Evaluation("MUSE", random_model, tokenizer, {}, cache_dir=tmp_path).add("a", [], count)
    assert again["agg_value"] == 0.5 and count.calls == 2
    Evaluation("MUSE", random_model, tokenizer, {}, cache_dir=tmp_path).add("a", [], count)
    assert count.calls == 2


def test_a_model_with_adapters_is_cached_under_what_they_learned(tmp_path, random_model, tokenizer):
    peft = pytest.importorskip("peft")
    count = Counter()

    def evaluate(model, calls):
        Evaluation("MUSE", model, tokenizer, {}, cache_dir=tmp_path).add("a", [], count)
        assert count.calls == calls

    evaluate(random_model, 1)
    adapted = peft.get_peft_model(random_model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    for _ in range(2):
        evaluate(adapted, 2)
    with torch.no_grad():
        next(p for name, p in adapted.named_parameters() if "lora_B" in name)[0, 0] += 1e-3
    evaluate(adapted, 3)


def test_a_reference_run_must_agree(tmp_path, random_model, tokenizer):
    with pytest.raises(ValueError, match="folder with the MUSE_EVAL.json"):
        ReferenceRun(tmp_path, "MUSE")
    Evaluation("MUSE", random_model, tokenizer, {"cut": 3, "marks": ("x",)}, out=tmp_path).add("a", ["t"], Counter())

    def compared(data=("t",), key="a", **changes):
        settings = {"cut": 3, "marks": ("x",)} | changes
        run = Evaluation("MUSE", random_model, tokenizer, settings, reference_run=tmp_path)
        run.add(key, list(data), Counter(0.75))
        return run.from_reference(key)

    assert compared()["agg_value"] == 0.5
    with pytest.raises(ValueError, match="other settings: cut 3 instead of 4"):
        compared(cut=4)
    with pytest.raises(ValueError, match="computed 'a' on other data"):
        compared(data=["u"])
    with pytest.raises(ValueError, match="has no result 'b'"):
        compared(key="b")
    (tmp_path / "MUSE_SETTINGS.json").write_text(json.dumps({"format": "other"}), encoding="utf-8")
    with pytest.raises(ValueError, match=f"format '{FORMAT}'; got 'other'"):
        compared()
    (tmp_path / "MUSE_EVAL.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="MUSE_EVAL.json is not readable JSON"):
        compared()


def test_an_open_unlearning_run_is_taken_with_a_warning(tmp_path, random_model, tokenizer):
    (tmp_path / "TOFU_EVAL.json").write_text(json.dumps({"a": Counter(0.2)()}), encoding="utf-8")
    with pytest.warns(UserWarning, match="is not checked"):
        run = Evaluation("TOFU", random_model, tokenizer, {}, reference_run=tmp_path)
    run.add("a", ["t"], Counter())
    assert run.from_reference("a")["agg_value"] == 0.2
    run.add("a", ["t"], lambda: {"agg_value": 1.0, "value_by_index": {"0": {}, "1": {}}})
    with pytest.raises(ValueError, match="has 1 rows in 'a'; expected 2"):
        run.from_reference("a")
