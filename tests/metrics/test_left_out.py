"""Rows that a model or a tokenizer cannot take cost no other row its number, and are named."""

import json

import pytest
from tokenizers import processors

from moe_unlearn.data import Document, encode, train_tokenizer
from moe_unlearn.metrics import (
    CompletionSettings,
    MuseData,
    MuseSettings,
    RwkuData,
    TofuData,
    TofuSettings,
    evaluate,
    evaluate_completions,
    evaluate_muse,
    evaluate_rwku,
    evaluate_tofu,
    like,
)

CHAT = "[{{ messages[0]['content'] }}]{% if messages[1] is defined %}{{ messages[1]['content'] }}</s>{% endif %}"
TEXTS = ["the wandering merchant carried lanterns", "every lighthouse keeper remembers an evening"]
QA = [{"question": "who carried lanterns", "answer": "the merchant"}, {"question": "when?", "answer": "an evening"}]
SPELLS = {"question": "who?", "answer": "a </s> b"}
LONG = {"question": "the " * 400, "answer": "yes"}
NO_LABEL = "expected at least one token with a label; got none"


@pytest.fixture(scope="module")
def bare():
    """A tokenizer that adds no token around a text."""
    made = train_tokenizer(TEXTS * 4, 300)
    made.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    made.chat_template = CHAT
    return made


@pytest.fixture()
def model(random_model):
    random_model.config.max_position_embeddings = 128
    return random_model.eval()


def between(rows, *others):
    """Return the rows with the others behind the first."""
    return [rows[0], *others, *rows[1:]]


def words(tokenizer, tokens):
    """Return a text of at least so many tokens, and few more."""
    texts = ("the" + " the" * n for n in range(tokens))
    return next(text for text in texts if len(tokenizer(text)["input_ids"]) >= tokens)


def written(folder, name, key):
    return json.loads((folder / f"{name}_EVAL.json").read_text("utf-8"))[key]


def places(result):
    return [(record["set"], record["row"]) for record in result["left_out"]]


def refuse(*arguments, **keywords):
    raise AssertionError("a forward pass")


def test_muse(model, bare, tmp_path, capsys):
    verbmem = [{"prompt": text[:12], "gt": text[12:]} for text in TEXTS]
    texts = [{"text": text} for text in TEXTS]
    clean = MuseData(verbmem=verbmem, forget_qa=QA, forget=texts, holdout=texts[::-1])
    mixed = MuseData(
        verbmem=between(verbmem, {"prompt": "the " * 400, "gt": "end"}, {"prompt": words(bare, 90), "gt": "end"}),
        forget_qa=between(QA, SPELLS, LONG),
        forget=between(texts, {"text": "a"}),
        holdout=between(texts[::-1], {"text": "b"}, {"text": "c"}),
    )
    settings = MuseSettings(verbmem_tokens=60, knowmem_tokens=8, chat=True)
    expected = evaluate_muse(model, bare, clean, settings=settings, out=tmp_path / "clean")
    assert capsys.readouterr().err == ""
    more = {"settings": settings, "out": tmp_path, "cache_dir": tmp_path / "cache", "gradient_norm": True}
    found = evaluate_muse(model, bare, mixed, **more)
    assert {key: found[key] for key in expected} == expected
    result = written(tmp_path, "MUSE", "forget_knowmem_ROUGE")
    assert places(result) == [("forget_qa", 1), ("forget_qa", 2)]
    first, second = (record["reason"] for record in result["left_out"])
    assert first == "its text spells the special token '</s>'" and "leaves no room for text in max_length 128" in second
    rows = result["value_by_index"]
    assert set(rows["1"].values()) == set(rows["2"].values()) == {None}
    kept = written(tmp_path / "clean", "MUSE", "forget_knowmem_ROUGE")["value_by_index"]
    assert [rows["0"], rows["3"]] == [kept["0"], kept["1"]]
    for key in ("forget_verbmem_ROUGE", "extraction_strength", "exact_memorization"):
        result = written(tmp_path, "MUSE", key)
        assert places(result) == [("verbmem", 1), ("verbmem", 2)] and len(result["value_by_index"]) == 4
    assert "60 new ones exceed the model's context of 128" in result["left_out"][1]["reason"]
    for key in ("mia_loss", "mia_min_k", "mia_zlib", "mia_gradnorm"):
        result = written(tmp_path, "MUSE", key)
        assert places(result) == [("forget", 1), ("holdout", 1), ("holdout", 2)]
        assert result["forget"]["value_by_index"]["1"] == {"score": None} and len(result["holdout"]) == 1
    told = capsys.readouterr().err
    assert told.count("forget_qa: left out 2: row 1: its text spells") == 1 and told.count("left out") == 4
    handle = model.register_forward_pre_hook(refuse)
    assert evaluate_muse(model, bare, mixed, **more) == found
    assert capsys.readouterr().err == told  # a cached result tells it too
    handle.remove()


def test_a_set_of_which_nothing_is_left_is_an_error_before_any_work(model, bare):
    model.register_forward_pre_hook(refuse)
    data = MuseData(forget_qa=QA, retain_qa=[SPELLS, LONG])
    with pytest.raises(ValueError, match="retain_qa, row 0: its text spells .*; none of its 2 rows can be measured"):
        evaluate_muse(model, bare, data, settings=MuseSettings(chat=True))
    with pytest.raises(ValueError, match="^holdout, row 0: its text spells the special token '</s>'$"):
        rows = [{**row, "perturbed_answer": ["no"], "paraphrased_answer": "so"} for row in QA]
        evaluate_tofu(model, bare, TofuData(forget=rows, holdout=[SPELLS]), settings=TofuSettings(chat=True))


def test_tofu(model, bare, tmp_path, capsys):
    rows = [{**row, "perturbed_answer": ["a bell", "no"], "paraphrased_answer": "so: " + row["answer"]} for row in QA]
    wrong, far = {**rows[0], "perturbed_answer": ["no", "a </s> b"]}, {**rows[0], "question": words(bare, 60)}
    sets = {"forget": rows, "retain": rows[::-1], "real_authors": rows, "world_facts": rows, "holdout": QA}
    settings = TofuSettings(chat=True, new_tokens=16)
    expected = evaluate_tofu(model, bare, TofuData(**sets), settings=settings)
    assert capsys.readouterr().err == "" and {"wagle_unlearn_effect", "wagle_utility"} <= expected.keys()
    mixed = {name: between(own, SPELLS if name == "holdout" else wrong) for name, own in sets.items()}
    found = evaluate_tofu(model, bare, TofuData(**mixed), settings=settings, out=tmp_path)
    assert found == expected
    prob = written(tmp_path, "TOFU", "forget_Q_A_PERT_Prob")
    assert places(prob) == [("forget", 1)] and prob["value_by_index"]["1"] == {"prob": None, "avg_loss": None}
    assert places(written(tmp_path, "TOFU", "mia_min_k")) == [("forget", 1), ("holdout", 1)]
    again = evaluate_tofu(model, bare, TofuData(**mixed), settings=settings, reference_run=tmp_path)
    assert again["forget_quality"] == 1
    # a question with no room for a greedy answer still has probabilities
    count = len(bare(f"[{far['question']}]")["input_ids"])
    settings = TofuSettings(chat=True, new_tokens=128 - count + 1)
    evaluate_tofu(model, bare, TofuData(world_facts=between(rows, far)), settings=settings, out=tmp_path / "far")
    assert places(written(tmp_path / "far", "TOFU", "wf_Q_A_ROUGE")) == [("world_facts", 1)]
    assert "left_out" not in written(tmp_path / "far", "TOFU", "wf_Q_A_Prob")


def test_open_unlearnings_ways_leave_no_label_of_an_answer_cut_to_one_token(model, bare, tmp_path, capsys):
    rows = [{**row, "perturbed_answer": ["no"], "paraphrased_answer": "so"} for row in QA]
    cut = {**rows[0], "question": "who carried lanterns across the frozen valleys before sunrise"}
    settings = like("open-unlearning", TofuSettings, new_tokens=4, question="{question} ")
    length = len(bare(f"{cut['question']} ")["input_ids"]) + 1
    settings = like("open-unlearning", TofuSettings, new_tokens=4, question="{question} ", max_length=length)
    data = {"forget": rows, "holdout": QA}
    expected = evaluate_tofu(model, bare, TofuData(**data), settings=settings)
    data = {"forget": between(rows, cut), "holdout": between(QA, {key: cut[key] for key in ("question", "answer")})}
    found = evaluate_tofu(model, bare, TofuData(**data), settings=settings, out=tmp_path)
    result = written(tmp_path, "TOFU", "mia_min_k")
    assert places(result) == [("forget", 1), ("holdout", 1)] and result["left_out"][0]["reason"] == NO_LABEL
    assert places(written(tmp_path, "TOFU", "extraction_strength")) == [("forget", 1)]
    assert "left_out" not in written(tmp_path, "TOFU", "forget_Q_A_Prob")
    assert all(found[key] == expected[key] for key in ("mia_min_k", "extraction_strength", "exact_memorization"))
    assert "holdout: left out 1: row 1" in capsys.readouterr().err


def test_a_text_beyond_the_context_is_cut_there_in_every_projects_way(model, tokenizer):
    texts = [{"text": "the " * 400}, {"text": TEXTS[0]}]
    for name in ("open-unlearning", "muse_bench"):
        settings = like(name, MuseSettings)
        assert "mia_min_k" in evaluate_muse(model, tokenizer, MuseData(forget=texts, holdout=texts), settings=settings)


def test_rwku(model, bare, tmp_path, capsys):
    probes = [{"query": row["question"], "answer": row["answer"]} for row in QA]
    texts = [{"text": text} for text in TEXTS]
    expected = evaluate_rwku(model, bare, RwkuData(forget_level2=probes, mia_forget=texts))
    assert capsys.readouterr().err == ""
    long = {"query": "the " * 100, "answer": "yes"}
    data = RwkuData(forget_level2=between(probes, long), mia_forget=between(texts, {"text": "a"}))
    assert evaluate_rwku(model, bare, data, out=tmp_path) == expected
    assert places(written(tmp_path, "RWKU", "forget_level2_ROUGE")) == [("forget_level2", 1)]
    assert written(tmp_path, "RWKU", "mia_forget_nll")["left_out"][0]["reason"] == NO_LABEL
    assert capsys.readouterr().err.count("left out 1: row 1: ") == 2


def test_completions(model, bare, tmp_path, capsys):
    settings = CompletionSettings(prompt_tokens=4, new_tokens=8)
    expected = evaluate_completions(model, bare, {"seen": TEXTS}, settings=settings)
    rows = between(TEXTS, "ab", {"prompt": "the " * 130, "gt": "end"}, "cd", "ef")
    found = evaluate_completions(model, bare, {"seen": rows}, settings=settings, out=tmp_path)
    assert found == {"seen_ROUGE": expected["seen_ROUGE"]}
    assert places(written(tmp_path, "COMPLETIONS", "seen_ROUGE")) == [("seen", i) for i in (1, 2, 3, 4)]
    told = capsys.readouterr().err
    assert told.startswith("seen: left out 4: row 1: expected a text of more than prompt_tokens = 4 tokens; got 'ab'")
    assert told.endswith("; ...\n")


def test_examples_without_a_label_do_not_enter_minkauc(model, bare, capsys):
    examples = encode([Document("", text) for text in TEXTS], bare, 64)
    # a document is split, and its last piece has one token, which nothing predicts
    length = len(examples[0]) - 1
    split = encode([Document("", TEXTS[0])], bare, length)
    assert [len(example) for example in split] == [length, 1]
    found = evaluate(model, bare, forget=split, retain=examples, holdout=examples[1:], reference_auc=0.25)
    assert found["minkauc_left_out"] == 1 and "forget: left out 1: row 1: no token" in capsys.readouterr().err
    expected = evaluate(model, bare, forget=split[:1], retain=examples, holdout=examples[1:], reference_auc=0.25)
    assert found["minkauc"] == expected["minkauc"] and found["privleak"] == expected["privleak"]
    assert "minkauc_left_out" not in expected
