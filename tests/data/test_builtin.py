"""The built-in corpora: split by subject, nothing leaks, hostile dictionaries are refused."""

import gzip

import pytest

from moe_unlearn import data
from moe_unlearn.data import builtin
from moe_unlearn.data.corpus import Corpus, Document, drop_shared_runs, runs, words

NAMES = ["builtin:pydoc", "builtin:devil"]


def load(name):
    try:
        return data.load_builtin(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def assert_disjoint(corpus, tokens):
    parts = {
        side: set().union(*(runs(tokens(d)) for d in getattr(corpus, side))) for side in ("forget", "retain", "holdout")
    }
    assert not parts["forget"] & parts["retain"]
    assert not parts["forget"] & parts["holdout"]
    assert not parts["retain"] & parts["holdout"]


@pytest.mark.quick
@pytest.mark.parametrize("name", NAMES)
def test_no_run_of_12_words_is_shared(name):
    corpus = load(name)
    assert len(corpus.forget) >= 150 and len(corpus.retain) >= 400 and len(corpus.holdout) >= 60
    assert_disjoint(corpus, words)
    assert corpus == data.load_builtin(name)


@pytest.mark.parametrize("name", NAMES)
def test_no_run_of_12_bpe_tokens_is_shared(name):
    corpus = load(name)
    documents = corpus.forget + corpus.retain + corpus.holdout
    tokenizer = data.train_tokenizer((f"{d.title}\n{d.text}" for d in documents), 1024)

    def tokens(document):
        return data.encode([document], tokenizer, 64, overflow="truncate")[0].input_ids

    clean = drop_shared_runs(corpus, tokens)
    assert_disjoint(clean, tokens)
    assert len(clean.forget) >= 0.9 * len(corpus.forget) and len(clean.holdout) >= 50


@pytest.mark.quick
def test_pydoc_is_split_by_subject_and_holds_every_paragraph_once():
    corpus = data.load_builtin("builtin:pydoc")
    subjects = {
        side: {d.title.rsplit(" ", 1)[0] for d in getattr(corpus, side)} for side in ("forget", "retain", "holdout")
    }
    assert subjects["forget"] | subjects["holdout"] <= set(builtin.PYDOC_FORGET)
    assert subjects["retain"] <= set(builtin.PYDOC_RETAIN)
    assert {"string-methods", "formatstrings", "debugger"} <= subjects["forget"] & subjects["holdout"]
    everything = corpus.forget + corpus.retain + corpus.holdout
    paragraphs = [p for d in everything for p in d.text.split("\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    assert len({d.title for d in everything}) == len(everything)


@pytest.mark.quick
def test_shared_runs_are_dropped_from_the_later_part_only():
    def document(start):
        return Document("", " ".join(str(i) for i in range(start, start + 20)))

    corpus = Corpus(
        "x",
        forget=[document(0), document(91), document(200)],
        retain=[document(100)],
        holdout=[document(208), document(209), document(300)],
    )
    clean = drop_shared_runs(corpus)
    # document(91) shares 100..110, eleven words: one too few; document(208) shares twelve with document(200)
    assert clean.forget == corpus.forget and clean.retain == corpus.retain
    assert clean.holdout == [document(209), document(300)]
    assert drop_shared_runs(corpus, length=11).forget == [document(0), document(200)]


def dictd(folder, name, entries, index=None):
    text, lines = b"", []
    for headword, body in entries:
        body = body.encode()
        lines.append(f"{headword}\t{base64(len(text))}\t{base64(len(body))}")
        text += body
    (folder / f"{name}.dict.dz").write_bytes(gzip.compress(text))
    (folder / f"{name}.index").write_text("\n".join(lines if index is None else index) + "\n", encoding="utf-8")


def base64(number):
    alphabet = {value: digit for digit, value in builtin.BASE64.items()}
    digits = alphabet[number % 64]
    while number := number // 64:
        digits = alphabet[number % 64] + digits
    return digits


@pytest.mark.quick
def test_dictionary_entries(tmp_path):
    long = "is a word whose explanation, for the sake of this test, must have more than eighty letters in it"
    dictd(tmp_path, "d", [("00databaseinfo", long * 30), ("zeal", f"ZEAL, n. {long}\n   é"), ("short", "no")])
    index = (tmp_path / "d.index").read_text(encoding="utf-8")
    zeal = index.splitlines()[1]
    assert len(zeal.split("\t")[1]) >= 2  # an offset of more than one base-64 digit
    (tmp_path / "d.index").write_text(index + zeal.replace("zeal", "zealous") + "\n", encoding="utf-8")
    assert builtin.read_dictd(tmp_path / "d") == [Document("zeal", f"n. {long} é")]


@pytest.mark.quick
@pytest.mark.parametrize("line", ["one two", "word\t!\tB", "word\tA\t////", "a\tb\tc\td"])
def test_a_broken_index_is_named(tmp_path, line):
    dictd(tmp_path, "d", [("word", "text")], index=["word\tA\tE", line])
    with pytest.raises(ValueError, match=r"d\.index, line 2"):
        builtin.read_dictd(tmp_path / "d")


@pytest.mark.quick
def test_missing_packages_and_unknown_names(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get install dict-devil dict-jargon"):
        builtin.devil(tmp_path)
    with pytest.raises(ValueError, match="builtin:devil, builtin:pydoc"):
        data.load_builtin("builtin:bible")
