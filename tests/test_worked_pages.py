"""Every worked page: its commands run, from top to bottom, with a tiny model and little data in place of the real ones.

The ids of models are folders here, so that nothing comes from the network, and what makes a run large is overridden.
"""

import json
import shlex
import subprocess
import sys

import pytest
import torch

from moe_unlearn.cli import main
from moe_unlearn.data import train_tokenizer
from tests.support.models import tiny_olmoe
from tests.support.pages import ROOT, blocks, commands
from tests.support.tokenizers import CHATML

pytestmark = pytest.mark.nightly
RECIPES, AUDIT = "moe_unlearn/recipes", "moe_unlearn/audit/README.md"
WORKED = {  # page, and the section if it is not all of it
    f"{RECIPES}/BOOK.md": "",
    f"{RECIPES}/PERSON.md": "",
    f"{RECIPES}/HAZARDS.md": "",
    AUDIT: "Somebody else's model",
    "moe_unlearn/regress/README.md": "A kernel of yours",
}
MODELS = ("allenai/OLMoE-1B-7B-0924", "Qwen/Qwen3-30B-A3B", "Qwen/Qwen1.5-MoE-A2.7B", "THEIRS", "ORIGINAL")
# of every run; RMU's layer and weights are of models with eight layers and more
TOY = ["steps=1", "data.max_length=48", "batch_size=2", "accumulate=1", "trace.min_ratio=1.0", "trace.min_load=0.1"]
RMU = ["forget.layer=1", r"scope.parameters=['layers\.1\..*experts\.down_proj$']"]
SIZED = {"eval": ["--max-length", "48"], "stats": ["--max-length", "48"]}
SIZED["audit"] = ["--max-length", "48", "--relearn-steps", "1"]


def texts(what, count):
    return [
        f"{what} {n} came to the harbour of Tarbh with {n * 37 % 101} crates of {n * 13 % 17} kinds"
        for n in range(count)
    ]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working folder with all that the pages name."""
    monkeypatch.chdir(tmp_path)
    sides = {"F": texts("the old ship", 8), "R": texts("a new boat", 12), "H": texts("some other raft", 8)}
    tokenizer = train_tokenizer([*sum(sides.values(), []), CHATML], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    for name in MODELS:
        torch.manual_seed(len(name))
        tiny_olmoe(vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(name)
        tokenizer.save_pretrained(name)
    named = {"cyber-forget-corpus": "F", "cyber-retain-corpus": "R", "new-papers": "H"}
    files = {f"{file}.jsonl": [{"text": text} for text in sides[side]] for file, side in named.items()}
    for file, side in (("person", "F"), ("others", "R")):
        files[f"{file}.jsonl"] = [{"question": text[:24], "answer": text[24:]} for text in sides[side]]
    asked = [{"question": text, "choices": ["1", "2", "3", "4"], "answer": 1} for text in sides["F"]]
    files |= {"wmdp_cyber.jsonl": asked, "mmlu.jsonl": [{**row, "subject": "ships"} for row in asked]}
    files |= {f"{side}/all.jsonl": [{"text": text} for text in own] for side, own in sides.items()}
    for file, rows in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "kept").mkdir()
    for file, side in (("book.txt", "F"), ("new.txt", "H"), ("kept/one.txt", "R"), ("kept/other.txt", "R")):
        (tmp_path / file).write_text("\n\n".join(sides[side]) + f"\n\n{file}\n", encoding="utf-8")
    python = next(block for block in blocks("moe_unlearn/regress/README.md") if block.language == "python")
    (tmp_path / "test_softmax.py").write_text(python.text, encoding="utf-8")
    return tmp_path


def lines(page, section):
    """The commands of a page's section."""
    text = (ROOT / page).read_text(encoding="utf-8")
    head, _, rest = text.partition(f"\n## {section}\n") if section else ("", "", text)
    first = head.count("\n")
    last = first + (rest.partition("\n## ")[0] if section else rest).count("\n") + 2
    own = [block for block in blocks(page) if block.language == "sh" and first < block.line <= last]
    return [words for block in own for words in commands(block.text)]


def small(words):
    """The words of a command of moe-unlearn, at toy size."""
    verb = words[0]
    if verb in ("run", "sweep"):
        more = TOY + (RMU if words[1] == "rmu" else [])
        if "--dry-run" in words and "--model" not in words:
            at = words.index("--model-config") + 1
            words = [*words[:at], MODELS[0], *words[at + 1 :]]
        if "optimizer.lr=3e-6,1e-5,3e-5" in words:
            words = [word.replace("3e-6,1e-5,3e-5", "1e-5,1e999") for word in words]  # the second one is refused
        return [*words, "--set", *more]
    if "--benchmark" in words or verb not in SIZED:
        return words
    return [*words, *SIZED[verb]]


def ran(words):
    """Run a command and return its exit code."""
    if words[0] == "torchrun":
        at = words.index("moe_unlearn") + 1
        command = [sys.executable, "-m", "torch.distributed.run", *words[1:at], *small(words[at:])]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return 0
    assert words[0] == "moe-unlearn", words
    return main(small(words[1:]))


@pytest.mark.parametrize("page", WORKED)
def test_the_commands_of_a_worked_page_run(page, place, capsys):
    found = lines(page, WORKED[page])
    assert len(found) >= 2
    for words in found:
        code = ran(words)
        told = capsys.readouterr()
        assert code == int("sweep" in words), f"{shlex.join(words)}\n{told.out[-1000:]}{told.err[-3000:]}"
    made = {
        f"{RECIPES}/BOOK.md": ["runs/book/report.html", "audits/book/AUDIT.html", "sweeps/book/sweep.csv"],
        f"{RECIPES}/PERSON.md": ["runs/person/model/config.json", "after.json", "routes.json"],
        f"{RECIPES}/HAZARDS.md": ["rmu.html", "rmu.tex", "runs/wmdp-after/LMEval_SUMMARY.json", "audits/wmdp/AUDIT.md"],
        AUDIT: ["audits/theirs/AUDIT.html"],
    }
    for name in made.get(page, ["kernels.xml"]):
        assert (place / name).is_file(), name


def test_every_worked_page_is_linked_from_the_recipes():
    text = (ROOT / RECIPES / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Worked from beginning to end")[2].partition("\n## ")[0]
    for page in WORKED:
        assert page.removeprefix(f"{RECIPES}/").removeprefix("moe_unlearn/").removesuffix("/README.md") in section, page
