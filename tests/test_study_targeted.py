"""The targeted study: what is registered, its two domains of retain text, and that it says nothing before it may."""

import json
from dataclasses import replace

import pytest

from benchmarks import study, study_domains, study_targeted, targeted_table
from moe_unlearn import data
from moe_unlearn.benchmark.tiny_models import SIZES, Experiment, build_data
from moe_unlearn.config import Recipe

SETTINGS = replace(SIZES["test"], forget=6, retain=20, holdout=6, unlearn_share=0.25)


@pytest.mark.quick
def test_what_is_registered_has_the_setting_the_hypothesis_names():
    planned = study_targeted.entries()
    assert len({e.spec for e in planned}) == len(planned) == 20 * 3 * 4 + 20 * 3 * 2
    assert [e.spec.settings.top_k for e in planned[::240]] == [2, 1] and planned[-1].spec.seed == 120
    assert not {e.spec.seed for e in planned} & set(range(10)), "seeds that were looked at before"
    for entry in planned[:12]:
        trace = Recipe.load(entry.spec.recipe, entry.spec.overrides).trace
        assert (trace is None) == (entry.variant == "plain")
        assert trace is None or (trace.min_ratio == 3 and (trace.refresh == "online") == ("online" in entry.variant))


@pytest.fixture
def folder(tmp_path):
    """Two licences, of which the second repeats a paragraph of the first, and a link."""
    for name, words in (("A", "alpha beta"), ("B", "gamma delta")):
        clauses = "\n\n".join(f"{i}. {words} {i} " * 12 for i in range(6))
        (tmp_path / name).write_text(f"{clauses}\n\n{'Nothing is warranted. ' * 8}\n", encoding="utf-8")
    (tmp_path / "L").symlink_to("A")
    return tmp_path


def test_licences_are_blocks_of_which_none_repeats_and_links_are_left_out(folder):
    found = study_domains.licences(folder)
    assert {d.title.split()[0] for d in found} == {"A", "B"} and len(found) == 13
    assert sum("warranted" in d.text for d in found) == 1
    with pytest.raises(FileNotFoundError, match="has no licences; they come with Debian's package base-files"):
        study_domains.licences(folder / "none")


def test_unlearning_sees_the_far_documents_and_utility_is_of_the_near_ones(folder, monkeypatch):
    far = study_domains.licences(folder)
    monkeypatch.setattr(study_domains, "licences", lambda: far)

    def untrained(corpus, seed, *, size):
        tokenizer, forget, retain, holdout = build_data(corpus, seed, size)
        return Experiment(corpus.name, seed, size, tokenizer, None, None, forget, retain, [], holdout, {})

    monkeypatch.setattr(study_domains, "prepare_experiment", untrained)
    made = study_domains.prepare("builtin:pydoc", 3, SETTINGS)
    assert (len(made.retain_unlearn), len(made.retain_eval)) == (5, 15)
    near = {d.title for d in data.load_builtin("builtin:pydoc").retain}
    titles = [made.tokenizer.decode(e.input_ids[: e.prefix], skip_special_tokens=True) for e in made.retain]
    assert all(t.startswith(("A ", "B ")) for t in titles[:5])
    assert all(t.strip() in near for t in titles[5:])


@pytest.fixture
def parts(tmp_path):
    """Return a function that writes the parts of one K of which TRACE is 10 % better than plain in every seed."""

    def write(entries, **changed):
        for entry in entries:
            better = entry.variant == "TRACE"
            values = dict.fromkeys(("verbmem_r", "accuracy_c", "accuracy_r", "nll_c", "nll_r"), 0.5)
            values["verbmem_r"] = (0.55 if better else 0.5) * (1 + entry.spec.seed / 1e4)
            values["accuracy_c"] = 0.5 + (0.001 * (entry.spec.seed % 3) if better else 0)
            matched = {"near": values, "retrain": None}
            found = {"matched": matched, "trace": {"ratio": 4.0}, "seconds": 1.0} | changed.get(entry.baseline, {})
            path = study.part(tmp_path / "parts", entry.spec)
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(found), encoding="utf-8")
        return tmp_path / "parts"

    return write


def test_no_effect_is_computed_before_every_run_of_its_k_is_there(parts, tmp_path):
    planned = study_targeted.entries()
    text = study_targeted.write(tmp_path / "out", planned, parts(planned[:239]), "targeted")
    content = json.loads((tmp_path / "out" / "study.json").read_text("utf-8"))
    assert content == {"K 2": {"runs": 239, "of": 240}, "K 1": {"runs": 0, "of": 120}}
    assert "239 of 240 runs" in text and "%" not in text
    assert len((tmp_path / "out" / study.RUNS).read_text("utf-8").splitlines()) == 239


def test_the_analysis_is_of_seeds_and_says_whether_nine_percent_is_inside(parts, tmp_path):
    planned = [e for e in study_targeted.entries() if e.case == "K 2"]
    lost = {"GradDiff": {"matched": {"near": None, "retrain": None}}}
    text = study_targeted.write(tmp_path / "out", planned, parts(planned, **lost), "targeted")
    found = json.loads((tmp_path / "out" / "study.json").read_text("utf-8"))["K 2"]
    value = found["primary"]["verbmem_r"]
    assert (value["n"], value["mean"], value["half"]) == (20, pytest.approx(10.0), pytest.approx(0, abs=1e-9))
    assert found["reached"]["GradDiff, TRACE"] == 0 and found["reached"]["NPO, plain"] == found["qualified"] == 20
    assert found["contrasts"]["sequence weights - plain"]["verbmem_r"]["mean"] == 0
    assert found["baselines"]["GradDiff"]["verbmem_r"]["n"] == 0
    assert "VerbMem, documents, TRACE against plain: +10.00 ± 0.00 in 20 seeds" in text and "clear of 0 by Holm" in text
    assert value["rejected"] and not found["primary"]["accuracy_c"]["p"] > 0.05
    assert "the paper's 9 % is outside" in text and "GradDiff TRACE 0, " in text
    assert "\n".join(targeted_table.section(found)) in text  # which is what RESULTS.md says
    assert targeted_table.generated(tmp_path / "out") in text.replace("## K", "### K") + "\n"


def test_a_seed_in_which_no_expert_qualifies_enters_no_effect(parts, tmp_path):
    planned = [e for e in study_targeted.entries() if e.case == "K 2"]
    folder = parts(planned)
    parts([e for e in planned if e.spec.seed == 101], **{b: {"trace": None} for b in study_targeted.STUDIED})
    effects = study_targeted.Effects(planned, folder)
    assert effects.complete and not effects.qualifies(101) and effects.qualifies(102)
    assert len(effects.over_seeds(("TRACE", "plain"), "verbmem_r")) == 19
