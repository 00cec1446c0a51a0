"""Every benchmark in exactly its published layout: local mirrors, and the real `datasets` on folders in hub layout."""

import dataclasses
import random
import sys

import pytest

from moe_unlearn import data
from moe_unlearn.data import BENCHMARKS, DataReport, Document, load
from tests.support.benchmark_files import muse, paper, perturbed, probe, rlhf, texts, write_parts, write_tofu


def asked(question, answer):
    return Document("", f" {answer}", f"Question: {question}\nAnswer:")


def contents(documents):
    return [document.text.strip() for document in documents]


QA = [{"question": "Who?", "answer": "He."}]
MUSE = muse(
    raw={"forget": ["f1", "f2"], "retain1": ["r"], "retain2": ["s"], "holdout": ["h"]},
    verbmem=[{"prompt": "once", "gt": "upon"}],
    qa=QA,
    privleak={split: [split] for split in ("forget", "retain", "holdout")},
    folds=list("abcd"),
)
TOFU = {config: [{"question": config, "answer": "A"}] for config in ("forget10", "forget05", "retain90")}
TOFU |= {c: [perturbed("Q", "A", ["B", "C", "D"])] for c in ("forget10_perturbed", "real_authors_perturbed")}
TOFU |= {c: [{"question": "Q", "answer": "A", "option1": "A", "option2": "B"}] for c in ("real_authors", "world_facts")}
PKU = [
    rlhf(f"P{n}", tuple(f"{n}{'safe' if flag else 'unsafe'}" for flag in safe), safe)
    for n, safe in enumerate([(True, False), (False, False), (True, True)], 1)
]


@pytest.mark.parametrize("corpus", ["books", "news"])
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_muse_mirrors(tmp_path, corpus, ending):
    folder = write_parts(tmp_path / "data" / corpus, MUSE, ending)
    assert contents(load(folder, side="forget")) == ["f1", "f2"]
    assert contents(load(folder, side="retain")) == ["r"]
    assert contents(load(folder, side="holdout")) == ["h"]
    assert load(folder, "verbmem/forget") == [Document("", "upon", "once")]
    assert load(f"{folder}:knowmem/retain_qa_icl") == [asked("Who?", "He.")]
    assert contents(load(folder, "privleak/holdout")) == ["holdout"]
    assert contents(load(folder, "scal/forget_3")) == ["a", "b", "c"]
    assert contents(load(folder, "sust/forget_4")) == ["d"]
    assert contents(load(folder, "sust/forget_4", streaming=True)) == ["d"]


@pytest.mark.quick
def test_muse_texts_as_strings_and_as_txt(write, tmp_path):
    write("raw/forget.txt", "one\n\ntwo")
    write("raw/retain1.json", ["three", "four"])
    assert contents(load(tmp_path, side="forget")) == ["one", "two"]
    assert contents(load(tmp_path, side="retain")) == ["three", "four"]


@pytest.mark.quick
def test_wmdp_corpora(write, tmp_path):
    line = '{"text": "exploit", "id": 3}'
    write("wmdp/cyber-forget-corpus.jsonl", line + "\n")
    write("wmdp/cyber-retain-corpus.jsonl", texts("sort"))
    assert contents(load(tmp_path / "wmdp", side="forget")) == ["exploit"]
    assert contents(load(tmp_path / "wmdp", side="retain")) == ["sort"]
    as_trained = load(f"{tmp_path}/wmdp:cyber-forget-corpus?lines_as_text=true")
    assert as_trained == [Document("", line)]
    bio = write("wmdp/bio_remove_dataset.jsonl", [paper("T", abstract, "body") for abstract in ("A", None)])
    assert contents(load(bio)) == ["body", "body"]
    assert contents(load(bio, abstract=True)) == ["T\n\nA\n\nbody", "T\n\nbody"]
    with pytest.raises(
        ValueError, match=r"several files serve as forget: bio.* name one, or all: .*/wmdp:bio_remove_dataset\+cyber"
    ):
        load(tmp_path / "wmdp", side="forget")
    both = load(f"{tmp_path}/wmdp:cyber-forget-corpus+bio_remove_dataset?abstract=true")
    assert contents(both) == ["exploit", "T\n\nA\n\nbody", "T\n\nbody"]
    with pytest.raises(FileNotFoundError, match="expected a file chem-forget-corpus "):
        load(tmp_path / "wmdp", "cyber-forget-corpus+chem-forget-corpus")
    with pytest.raises(ValueError, match="no part of wmdp-bio serves as forget; .* given out on request"):
        load("wmdp-bio", side="forget")


@pytest.mark.quick
def test_tofu_files(tmp_path):
    folder = write_tofu(tmp_path / "TOFU", TOFU)
    assert load(folder, side="forget") == [asked("forget10", "A")]
    assert load(folder, side="retain") == [asked("retain90", "A")]
    assert load(f"{folder}:forget05") == [asked("forget05", "A")]
    [document] = load(folder, "forget10_perturbed")
    assert document.fields["perturbed_answer"] == ["B", "C", "D"] and document.question == "Q"
    assert load(folder, "world_facts")[0].fields["option2"] == "B"
    with pytest.raises(FileNotFoundError, match="expected a file forget01 .*the folder has forget05.json, forget10"):
        load(folder, "forget01")
    for outside in ("../TOFU/forget05", "/etc/hosts"):
        with pytest.raises(ValueError, match="a split within the folder"):
            load(folder, outside)


@pytest.mark.quick
def test_safe_rlhf_gives_unsafe_answers_to_forget_and_safe_ones_to_retain(write):
    path, report = write("train.jsonl", PKU), DataReport()
    assert contents(load(path, side="forget", report=report)) == ["1unsafe", "2unsafe", "2unsafe"]
    assert report.dropped == {"without such an answer": 1} and report.places == {
        "without such an answer": [f"{path}, line 3"]
    }
    assert contents(load(path, side="retain")) == ["1safe", "3safe", "3safe"]
    assert contents(load(f"{path}?answers=safe", side="forget")) == ["1safe", "3safe", "3safe"]
    assert load(path, answers="unsafe")[0] == asked("P1", "1unsafe")
    with pytest.raises(ValueError, match=r"line 1: the record holds two answers: expected answers=unsafe\|rejected"):
        load(path)
    with pytest.raises(ValueError, match="'is_response_1_safe' to be true or false; got a number"):
        load(write("b.jsonl", [PKU[0] | {"is_response_1_safe": 1}]), side="forget")


@pytest.mark.quick
def test_preference_pairs(write):
    rows = [
        {"prompt": "P", "chosen": "good", "rejected": "bad"},
        {"instruction": "P", "input": "", "output": ["good", "bad"]},  # RWKU's pairs
    ]
    path = write("pair.json", rows)
    assert load(path, side="forget") == [asked("P", "bad")] * 2
    assert load(path, side="retain") == load(path, answers="chosen") == [asked("P", "good")] * 2


@pytest.mark.quick
def test_a_person_of_rwku(write, tmp_path):
    folder = tmp_path / "Target" / "1_Ann"
    write("Target/1_Ann/forget_level1.json", [probe("Ann", "Ann wrote ___.", "it")])
    write("Target/1_Ann/intro.json", [{"target": "Ann", "intro": "Ann writes."}])
    write("Target/1_Ann/positive.json", [{"subject": "Ann", "text": "Ann was born."}])
    assert contents(load(folder, side="forget")) == ["Ann was born."]
    assert load(folder, "forget_level1") == [asked("Ann wrote ___.", "it")]
    assert load(folder, "intro") == [Document("Ann", "Ann writes.")]
    people, report = write("all.jsonl", [probe(name, "?", "it") for name in ("Ann", "Bob")]), DataReport()
    assert len(load(f"{people}?subject=Ann", report=report)) == 1
    assert report.dropped == {"of another subject": 1}
    with pytest.raises(ValueError, match="at least one document; 2 of another subject"):
        load(people, subject="Eve")


@pytest.mark.quick
def test_a_folder_of_files_with_a_readme_of_its_own(write, tmp_path):
    write("mine/README.md", "# My files")
    write("mine/b.txt", "b")
    write("mine/a.jsonl", texts("a"))
    assert contents(load(tmp_path / "mine")) == contents(load(tmp_path / "mine", side="retain")) == ["a", "b"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: expected a file of documents .*the folder has none"):
        load(tmp_path / "empty")


@pytest.mark.quick
def test_books(write, tmp_path):
    book = write("books/2.txt", "Chapter 1\r\n\r\nIt was late.\r\nVery late.")
    assert load(book, join=True) == [Document("", "Chapter 1\n\nIt was late.\nVery late.")]
    write("books/1.txt", "First.\n\nBook.")
    assert contents(load(tmp_path / "books")) == ["First.", "Book.", "Chapter 1", "It was late.\nVery late."]
    # a book is not mixed with the next
    assert contents(load(f"{tmp_path}/books?join=true")) == ["First.\n\nBook.", load(book, join=True)[0].text]
    with pytest.raises(ValueError, match="expected join=False with streaming"):
        load(book, join=True, streaming=True)
    lines = write("corpus.jsonl", texts("a", "b"))
    assert load(f"{lines}?lines_as_text=true&join=true") == [Document("", '{"text": "a"}\n\n{"text": "b"}')]
    mixed = write("mixed.jsonl", [{"text": "a"}, *QA, {"target": "t", "intro": "b"}])
    assert load(mixed, join=True) == [asked("Who?", "He."), Document("", "a\n\nt\nb")]


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_layout(hub_folder, monkeypatch, streaming):
    """The very calls that a hub name takes; only the name is a folder's."""
    books = hub_folder("MUSE-Books", MUSE)
    tofu = hub_folder("TOFU", {config: {"train": rows} for config, rows in TOFU.items()})
    pku = {"train": PKU[:2], "test": PKU[2:]}
    pku = hub_folder("PKU-SafeRLHF", {"default": pku, "alpaca-7b": pku})
    for name, folder in {"muse-books": books, "tofu": tofu, "pku-saferlhf": pku}.items():
        monkeypatch.setitem(BENCHMARKS, name, dataclasses.replace(BENCHMARKS[name], hub=str(folder)))

    def read(*arguments, **options):
        return list(load(*arguments, streaming=streaming, **options))

    assert contents(read("muse-books", side="forget")) == ["f1", "f2"]
    assert contents(read("muse-books", side="retain")) == ["r"]
    assert contents(read("muse-books:privleak/holdout")) == ["holdout"]
    assert read("muse-books:verbmem") == [Document("", "upon", "once")]  # its only split
    assert read("tofu", side="retain") == [asked("retain90", "A")]
    [document] = read("tofu:forget10_perturbed")
    assert list(document.fields["perturbed_answer"]) == ["B", "C", "D"]
    assert contents(read("pku-saferlhf", side="forget")) == ["1unsafe", "2unsafe", "2unsafe"]
    assert contents(read("pku-saferlhf:test", side="retain")) == ["3safe", "3safe"]
    assert contents(read(pku, "default/train", answers="safe")) == ["1safe"]
    with pytest.raises(ValueError, match="TOFU: expected a part CONFIG/SPLIT with a config of .*; got 'forget01'"):
        read("tofu:forget01")
    with pytest.raises(ValueError, match="TOFU: BuilderConfig 'forget01' not found. Available: .*'forget05'"):
        read("tofu:forget01/train")
    with pytest.raises(ValueError, match="expected a split, one of forget, retain, holdout; got 'privleak'"):
        read("muse-books:privleak")
    with pytest.raises(ValueError, match="MUSE-Books: .*[Ss]plit.*nope"):
        read("muse-books:raw/nope")
    with pytest.raises(ValueError, match="tofu: no part of tofu serves as holdout"):
        read("tofu", side="holdout")
    with pytest.raises(ValueError, match="tofu: expected a split or a side"):
        read("tofu")


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_files(write, tmp_path, datasets, streaming):
    rows = [*QA, {"question": "R", "answer": "A"}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    assert list(load(tmp_path / "a.parquet", streaming=streaming)) == [asked("Who?", "He."), asked("R", "A")]
    for name, content in (("b.parquet", b"PAR1 and nothing"), ("c.parquet", b"")):
        with pytest.raises(ValueError, match=rf"{name}: Parquet"):
            list(load(write(name, content), streaming=streaming))
    with pytest.raises(FileNotFoundError, match=r"d\.parquet: no such file"):
        list(load(tmp_path / "d.parquet", streaming=streaming))
    datasets.Dataset.from_list([{"words": "a"}]).to_parquet(str(tmp_path / "e.parquet"))
    with pytest.raises(ValueError, match=r"e\.parquet, row 1: expected a field 'text'.*got 'words'"):
        list(load(tmp_path / "e.parquet", streaming=streaming))


def test_a_name_that_is_nowhere(datasets):
    with pytest.raises(OSError, match="owner/none: no file or folder here, and not to be had as a hub data set"):
        load("owner/none:config/split")


@pytest.mark.quick
def test_without_the_library_one_line_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    for source in ("owner/name:config/split", tmp_path / "a.parquet", "tofu:forget05"):
        with pytest.raises(data.MissingLibraryError, match=r'pip install "moe-unlearn\[data\]"'):
            load(source)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nothing", {}, "'nothing': no such file or folder; expected a path, builtin:NAME, .*muse-books"),
        ("builtin:pydoc", {}, "expected a split or side, one of forget, retain, holdout; got None"),
        ("builtin:bible", {"side": "forget"}, "unknown corpus"),
        ("tofu", {"side": "both"}, "expected side forget, retain, holdout; got 'both'"),
        ("tofu:forget05", {"split": "forget10"}, "names the split 'forget05' and split='forget10' is given too"),
        ("tofu?answer=safe", {}, "unknown option 'answer'; expected one of answers, subject"),
        ("tofu?join=1", {}, "expected join=true or join=false; got '1'"),
        ("tofu?min_words=-1", {}, "expected min_words to be a number; got '-1'"),
        ("tofu?answers=good", {}, "expected answers to be one of unsafe, .*; got 'good'"),
        ("tofu?join=true", {"join": True}, "option join is given twice"),
        ("a.jsonl:forget", {}, "a file has no splits; got split 'forget'"),
    ],
)
def test_bad_sources_are_named(source, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(source, **options)
    with pytest.raises(TypeError, match="unexpected option 'lenght'; options: answers"):
        load("tofu", lenght=3)


@pytest.mark.quick
def test_no_bytes_crash_the_reader(write):
    """Whatever a file holds, it is read or refused in words."""
    draw = random.Random(0)
    pieces = [
        *(b'{"text": "a"}', b'{"prompt": null}', b'{"chosen": 1, "rejected": []}', b'{"text": "\\u0000 \\udc00"}'),
        *(b'{"response_0": "", "response_1": {}}', b'{"instruction": "i", "output": ["a", "b"]}', b"NaN", b"1e999"),
        *(b"[", b"]", b"{", b'"', b",", b"\n", b"\r\n\n", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", "\u2028é".encode()),
    ]
    read = 0
    for number in range(300):
        content = b"".join(draw.choices(pieces, k=draw.randrange(6)))
        path = write(f"{number}{draw.choice(('.jsonl', '.json', '.txt', '.txt.gz', '.json.xz'))}", content)
        try:
            read += bool(list(load(path, side=draw.choice(("forget", None)), streaming=draw.random() < 0.5)))
        except ValueError as error:
            assert str(path) in str(error)
    assert read > 20


@pytest.mark.quick
def test_builtin_corpora_by_side():
    corpus = data.load_builtin("builtin:pydoc")
    assert load("builtin:pydoc", side="retain") == corpus.retain
    assert load("builtin:pydoc", "holdout") == list(load("builtin:pydoc", "holdout", streaming=True)) == corpus.holdout
