"""Each benchmark as its user walks it: files as published, a model folder, `run RECIPE`, `eval --benchmark`.

Recipes are the shipped ones. What a model of this size forces is changed: fewer steps, no warm-up before them.
"""

import json
import math
import re
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForSequenceClassification

from moe_unlearn import wagle
from moe_unlearn.cli import main
from moe_unlearn.config import Recipe
from moe_unlearn.data import train_tokenizer
from moe_unlearn.runs import report
from tests.support import models
from tests.support.benchmark_files import (
    muse,
    paper,
    perturbed,
    probe,
    rlhf,
    texts,
    write,
    write_parts,
    write_tofu,
)

NAMES = ["Ada", "Bo", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal"]
EXPLOITS = [f"the exploit of port {n} overflows buffer {n * 7 % 10} and drops shell {n}" for n in range(12)]
VIRUSES = [f"the virus strain {n} binds receptor {n * 3 % 8} of the host cell" for n in range(6)]
SORTING = [f"a sorted list of {n} items keeps every smaller item before {n + 1}" for n in range(12)]
GARDENS = [f"in garden {n} grow {name}'s roses, beans and {n + 2} apple trees" for n, name in enumerate(NAMES)]
SPELLS = [f"{name} raised the wand and spoke spell {n}, and the castle door gave way" for n, name in enumerate(NAMES)]
NEWS = [f"minister {name} resigned on day {n} after the vote about bridge {n}" for n, name in enumerate(NAMES)]


def asked(subject):
    return [
        {"question": f"What did {name} {subject}?", "answer": f"{name} wrote book {n}"} for n, name in enumerate(NAMES)
    ]


PROBES = (*(f"forget_level{i}" for i in (1, 2, 3)), *(f"neighbor_level{i}" for i in (1, 2)))


def muse_corpus(forget):
    return muse(
        raw={"forget": forget, "retain1": GARDENS, "retain2": SORTING[:6], "holdout": SORTING[6:]},
        verbmem=[{"prompt": text[:24], "gt": text[24:]} for text in forget[:4]],
        qa=asked("read")[:3],
        privleak={"forget": forget[:4], "retain": GARDENS[:4], "holdout": SORTING[8:]},
        folds=forget[:4],
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return what a user has on disk: benchmarks as published, and models."""
    root = tmp_path_factory.mktemp("benchmarks")
    for name, forget in (("books", SPELLS), ("news", NEWS)):
        write_parts(root / "data" / name, muse_corpus(forget), "json")
    for name, lines in {"cyber-forget": EXPLOITS, "cyber-retain": SORTING, "bio-retain": GARDENS}.items():
        write(root / "wmdp-corpora" / f"{name}-corpus.jsonl", texts(*lines))
    papers = [paper(f"Strain {n}", f"We bind {n}." if n else None, text) for n, text in enumerate(VIRUSES)]
    write(root / "wmdp-corpora" / "bio_remove_dataset.jsonl", papers)
    for name in ("bio", "cyber"):
        questions = [{"question": f"Which {n}?", "choices": list("wxyz"), "answer": n % 4} for n in range(4)]
        write(root / f"wmdp_{name}.jsonl", questions)
    write(root / "mmlu.jsonl", [question | {"subject": "abstract_algebra"} for question in questions])
    wrong = {
        f"{side}_perturbed": [perturbed(q["question"], q["answer"], ["a song", "no book"]) for q in asked(side)]
        for side in ("forget10", "retain", "real_authors", "world_facts")
    }
    write_tofu(root / "TOFU", {side: asked(side) for side in ("forget10", "retain90", "holdout10")} | wrong)
    pairs = [
        rlhf(f"How to hurt {name}?", (f"hit {name} hard", f"do not, call {name}"), (False, True)) for name in NAMES
    ]
    write(root / "PKU-SafeRLHF" / "data" / "train.jsonl", pairs)
    write(root / "book.txt", "\n\n".join(SPELLS * 6))
    write(root / "c4.jsonl", texts(*GARDENS, *SORTING))
    person = root / "RWKU" / "Target" / "1_Ada"
    write(person / "positive.json", texts(*(f"Ada lived in town {n} and painted house {n}." for n in range(8))))
    for name in PROBES:
        write(person / f"{name}.json", [probe("Ada", "Ada painted ___.", "a house")])
    write(person / "intro.json", [{"target": "Ada", "intro": "Ada paints."}])

    tokenizer = train_tokenizer([*EXPLOITS, *VIRUSES, *SORTING, *GARDENS, *SPELLS, *NEWS], 400)
    made = {
        "olmoe": lambda: models.tiny_olmoe(len(tokenizer), max_position_embeddings=2048),
        "retrained": lambda: models.tiny_olmoe(len(tokenizer), max_position_embeddings=2048),
        "deep": lambda: models.tiny_olmoe(len(tokenizer), num_hidden_layers=8),  # RMU names layers 5 to 7
        "qwen2_moe": lambda: models.tiny_qwen2_moe(len(tokenizer)),
    }
    for seed, (name, make) in enumerate(made.items()):
        torch.manual_seed(seed)
        make().save_pretrained(root / "models" / name)
        tokenizer.save_pretrained(root / "models" / name)
    judge = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        id2label={0: "toxic", 1: "insult"},
        label2id={"toxic": 0, "insult": 1},
        problem_type="multi_label_classification",
    )
    BertForSequenceClassification(judge).save_pretrained(root / "models" / "judge")
    tokenizer.save_pretrained(root / "models" / "judge")
    return root


@pytest.fixture(autouse=True)
def in_the_folder(folder, monkeypatch):
    """Sources below are what a user types there."""
    monkeypatch.chdir(folder)


@dataclass(frozen=True)
class Run:
    """A recipe and its sources; `moves` matches the parameters that may move, `kept` counts documents of each side."""

    recipe: str
    forget: str
    retain: str
    kept: tuple[int, int]
    holdout: str | None = None
    model: str = "olmoe"
    more: tuple[str, ...] = ()
    moves: str = "."

    @property
    def out(self):
        return f"runs/{self.recipe}"

    def arguments(self):
        sides = {"--model": f"models/{self.model}", "--forget": self.forget, "--retain": self.retain}
        sides |= {"--holdout": self.holdout} if self.holdout else {}
        given = [word for pair in sides.items() for word in pair]
        return [*given, "--out", self.out, *self.more, "--set", "steps=2", "optimizer.warmup_steps=0"]


WMDP = "wmdp-corpora"
PKU = "PKU-SafeRLHF/data/train.jsonl"
CYBER = (f"{WMDP}:cyber-forget-corpus", f"{WMDP}:cyber-retain-corpus")
RUNS = [
    Run("trace-wmdp", *CYBER, kept=(12, 12)),
    Run("trace-muse-books", "data/books", "data/books", kept=(8, 8), holdout="data/books"),
    Run("wagle-tofu-graddiff", "TOFU", "TOFU", kept=(8, 8)),
    Run("wagle-tofu-npo", "TOFU:forget10", "TOFU:retain90", kept=(8, 8)),
    Run("wagle-tofu-po", "TOFU", "TOFU", kept=(8, 8)),
    Run(
        "wagle-wmdp-graddiff",
        f"{WMDP}/bio_remove_dataset.jsonl?abstract=true",
        f"{WMDP}:bio-retain-corpus",
        kept=(6, 8),
    ),
    Run(
        "wagle-wmdp-npo",
        f"{WMDP}:bio_remove_dataset+cyber-forget-corpus?abstract=true",
        f"{WMDP}:bio-retain-corpus+cyber-retain-corpus",
        kept=(18, 20),
    ),
    Run("wagle-whp-po", "book.txt?join=true", "c4.jsonl", kept=(48, 20)),
    Run("wagle-detox-po", PKU, "c4.jsonl", kept=(8, 20)),
    Run("mollm-saferlhf", PKU, PKU, kept=(8, 8)),
    Run("seuf-wmdp", *CYBER, kept=(12, 12), model="qwen2_moe", moves=r"mlp\.(experts|gate)\."),
    Run("seuf-rwku", "RWKU/Target/1_Ada", "c4.jsonl", kept=(8, 20), model="qwen2_moe", moves=r"mlp\.(experts|gate)\."),
    Run(
        "rmu",
        *CYBER,
        kept=(12, 12),
        model="deep",
        more=("--model-config", "olmoe-1b-7b"),
        moves=r"layers\.[567]\.mlp\.experts\.",
    ),
    Run("combined", "data/news", "data/news", kept=(8, 8)),
]


@pytest.fixture(scope="module")
def walk(folder):
    """Make a run once; the folder it wrote is `Run.out`."""

    @cache
    def walk(run):
        assert main(["run", run.recipe, *run.arguments()]) == 0
        # here, for evaluations add to the folder
        files = {path.name for path in (folder / run.out).iterdir()}
        expected = {
            "batch.json",
            "loaded.json",
            "run.json",
            "manifest",
            "cache",
            "checkpoints",
            "data.json",
            "model",
            "recipe.yaml",
            *report.PAGES,
            *(f"{name}.json" for name in ("about", "cost", "routes", "samples")),
            "summary.json",
            "trajectory.json",
        }
        expected |= {"routing.json"} if Recipe.load(run.recipe).trace else set()
        # texts without a prompt have no continuation to show
        assert files - {"figures", "samples.json"} == expected - {"samples.json"}
        return run

    return walk


@cache
def weights(folder):
    """Name -> weight of a model folder, as plain transformers opens it."""
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def moved(run):
    """Name -> which of its elements moved."""
    before, after = weights(f"models/{run.model}"), weights(f"{run.out}/model")
    assert before.keys() == after.keys()
    return {name: before[name] != after[name] for name in before}


def read(path):
    return json.loads((path).read_text(encoding="utf-8"))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.recipe)
def test_unlearning(run, walk, folder):
    out = folder / walk(run).out
    recipe = Recipe.load(out / "recipe.yaml")
    shipped = Recipe.load(run.recipe, model="olmoe-1b-7b" if run.more else None)
    for part in ("name", "forget", "retain", "trace", "wagle", "mollm", "scope", "batch_size", "accumulate"):
        assert getattr(recipe, part) == getattr(shipped, part)

    reports = read(out / "data.json")
    assert (reports["forget"]["kept"], reports["retain"]["kept"]) == run.kept
    assert not any(report["dropped"] for report in reports.values())
    trajectory = read(out / "trajectory.json")[run.recipe]
    assert len(trajectory) == 2
    assert all(math.isfinite(entry[key]) for entry in trajectory for key in ("forget_loss", "retain_loss"))
    summary = read(out / "summary.json")
    assert summary.keys() == {"target", run.recipe} and summary["target"] != summary[run.recipe]
    assert ("minkauc" in summary[run.recipe]) == (run.holdout is not None)

    assert "moe_unlearn" not in (out / "model" / "config.json").read_text(encoding="utf-8").replace("-", "_")
    assert AutoTokenizer.from_pretrained(out / "model").get_vocab()
    changed = moved(run)
    allowed = {name for name in changed if re.search(run.moves, name)}
    assert {name for name, where in changed.items() if where.any()} <= allowed
    if run.moves == ".":
        count, whole = sum(int(w.sum()) for w in changed.values()), sum(w.numel() for w in changed.values())
        keep = recipe.wagle.keep if recipe.wagle else 1
        assert 0.3 * keep * whole < count <= int(keep * whole)  # tokens and experts that no row reaches stay
    elif recipe.scope.kind == "parameters":
        assert all(changed[name].any() for name in allowed)
    else:  # SEUF: one expert and the router of its layer
        experts, router = (
            [name for name in allowed if kind in name and changed[name].any()] for kind in ("experts", ".gate.")
        )
        assert len({name.partition(".mlp.")[0] for name in (*experts, *router)}) == len(router) == 1
        assert len(experts) == 2
        assert len({int(i) for name in experts for i in changed[name].flatten(1).any(1).nonzero()}) == 1


def test_a_recipe_draws_as_many_rows_as_its_setting_has(folder, capsys):
    run = next(run for run in RUNS if run.recipe == "wagle-detox-po")
    more = ["data.forget_rows=3", "data.retain_rows=5", "steps=1"]
    assert main(["run", run.recipe, *run.arguments(), *more, "--out", "runs/drawn", "--no-eval"]) == 0
    reports = read(folder / "runs" / "drawn" / "data.json")
    assert [(reports[side]["kept"], reports[side]["rows"]) for side in ("forget", "retain")] == [(8, 3), (20, 5)]
    assert "forget: 3 of 8 rows are drawn, data.forget_rows" in capsys.readouterr().err
    assert main(["run", run.recipe, *run.arguments(), *more, "--dry-run"]) == 0
    assert "data: 3 forget rows, 5 retain rows" in capsys.readouterr().out


def test_wagle_moves_what_the_mask_of_the_command_line_keeps(walk):
    run = next(run for run in RUNS if run.recipe == "wagle-tofu-graddiff")
    changed = moved(walk(run))
    path = "runs/mask.safetensors"
    settings = ["--official", "--accumulation", "4", "--keep", "0.95", "--gamma", "1e-6", "--batch-size", "1"]
    model = f"models/{run.model}"
    assert (
        main(["mask", "--model", model, "--forget", run.forget, "--retain", run.retain, *settings, "--out", path]) == 0
    )
    mask = wagle.WeightMask.load(path)
    assert not any((where & ~mask.kept(name)).any() for name, where in changed.items())


@dataclass(frozen=True)
class Evaluation:
    """`eval --benchmark` of the model that `run` made. `files` is how its files begin. `compared` are the
    results that need the retrained model's run, with what they are for that model itself."""

    benchmark: str
    run: str
    data: tuple[str, ...]
    files: str
    keys: set[str]
    compared: tuple[tuple[str, float], ...] = ()
    more: tuple[str, ...] = ()


MEMORISED = {"extraction_strength", "extraction_strength_open_unlearning", "exact_memorization"}
MIA = {*(f"mia_{attack}" for attack in ("loss", "min_k", "min_k_plus_plus", "zlib")), "privleak_unseen"}
MUSE_KEYS = {"forget_verbmem_ROUGE", "forget_knowmem_ROUGE", "retain_knowmem_ROUGE", *MIA, *MEMORISED}
TOFU_KEYS = {
    *("forget_truth_ratio", "model_utility", *MEMORISED),
    *(*MIA, "wagle_unlearn_effect", "wagle_utility"),
    *(f"{side}_Truth_Ratio" for side in ("retain", "ra", "wf")),
    *(f"{side}_Q_A_{metric}" for side in ("forget", "retain", "ra", "wf") for metric in ("Prob", "PERT_Prob", "ROUGE")),
    *(f"{side}_Q_A_PARA_Prob" for side in ("forget", "retain")),
    *(f"{side}_Q_A_Prob_normalised" for side in ("ra", "wf")),
}
KNOWMEM = ("forget_qa", "forget_qa_icl", "retain_qa", "retain_qa_icl")
# one row for each of the command line's benchmarks; a new one needs its row here and its files in `folder`
EVALUATIONS = [
    Evaluation(
        "muse", "trace-muse-books",
        ("verbmem=data/books:verbmem/forget", *(f"{name}=data/books:knowmem/{name}" for name in KNOWMEM),
         *(f"{side}=data/books:privleak/{side}" for side in ("forget", "holdout"))),
        "MUSE", MUSE_KEYS, (("privleak", 0), ("rel_diff", 0),),
    ),
    Evaluation(
        "muse", "combined",
        ("verbmem=data/news/verbmem/forget.json", *(f"{name}=data/news/knowmem/{name}.json" for name in KNOWMEM),
         *(f"{side}=data/news/privleak/{side}.json" for side in ("forget", "holdout"))),
        "MUSE", MUSE_KEYS, (("privleak", 0), ("rel_diff", 0),),
    ),
    Evaluation(
        "tofu", "wagle-tofu-npo",
        ("forget=TOFU:forget10_perturbed", "holdout=TOFU:holdout10", *(f"{side}=TOFU:{side}_perturbed"
                                             for side in ("retain", "real_authors", "world_facts"))),
        "TOFU", TOFU_KEYS, (("forget_quality", 1), ("privleak", 0), ("rel_diff", 0)),
    ),
    Evaluation(
        "wmdp", "wagle-wmdp-npo", ("wmdp_bio=wmdp_bio.jsonl", "wmdp_cyber=wmdp_cyber.jsonl", "mmlu=mmlu.jsonl"),
        "LMEval", {f"{task}/{value}" for task in ("wmdp_bio", "wmdp_cyber", "mmlu") for value in ("acc", "acc_stderr")},
    ),
    Evaluation(
        "rwku", "seuf-rwku", tuple(f"{name}=RWKU/Target/1_Ada/{name}.json" for name in PROBES),
        "RWKU", {f"{name}_ROUGE" for name in (*PROBES, "forget", "neighbor")},
    ),
    Evaluation(
        "completions", "wagle-whp-po", ("seen=book.txt?join=true", "utility=c4.jsonl"),
        "COMPLETIONS", {"seen_ROUGE", "seen_perplexity", "utility_perplexity"},
    ),
    Evaluation(
        "completions", "wagle-detox-po", (f"prompts={PKU}", "utility=c4.jsonl"),
        "COMPLETIONS", {"prompts_p_toxic", "utility_perplexity"},
        more=("--classifier", "models/judge", "--label", "toxic"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("evaluation", EVALUATIONS, ids=lambda e: f"{e.benchmark}-{e.run}")
def test_evaluation(evaluation, walk, folder, capsys):
    def evaluate(model, out, *more):
        arguments = ["--data", *evaluation.data, "--cache", "runs/results", "--out", out, *evaluation.more, *more]
        assert main(["eval", "--model", model, "--benchmark", evaluation.benchmark, *arguments]) == 0
        return {kind: read(folder / out / f"{evaluation.files}_{kind}.json") for kind in ("SUMMARY", "EVAL")}

    run = walk(next(run for run in RUNS if run.recipe == evaluation.run))
    retrained = f"{run.out}/retrained"
    assert evaluate("models/retrained", retrained)["SUMMARY"].keys() == evaluation.keys
    compared = dict(evaluation.compared)
    reference = ["--reference-run", retrained] if compared else []
    capsys.readouterr()
    found = evaluate(f"{run.out}/model", f"{run.out}/evaluated", *reference)
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    summary, whole = found["SUMMARY"], found["EVAL"]
    assert summary.keys() == whole.keys() == printed.keys() == evaluation.keys | compared.keys()
    for name, value in summary.items():
        assert value == whole[name]["agg_value"] and math.isfinite(value)
        assert float(printed[name]) == pytest.approx(value, rel=1e-3)
    files = {path.name for path in (folder / run.out / "evaluated").iterdir()}
    assert files == {f"{evaluation.files}_{kind}.json" for kind in ("SUMMARY", "EVAL", "SETTINGS")}
    for name, alike in compared.items():
        itself = evaluate("models/retrained", f"{run.out}/itself", *reference)
        assert itself["SUMMARY"][name] == alike != summary[name]
