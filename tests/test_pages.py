"""Every page: its Python runs, its commands are ones that exist, its links lead somewhere, its lines are short."""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import re
import runpy
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch
import yaml

import moe_unlearn
from moe_unlearn import config, data
from moe_unlearn.regress import case as registry
from moe_unlearn.regress import static_case
from tests.support.batches import random_batches
from tests.support.models import tiny_olmoe
from tests.support.pages import ROOT, Block, blocks, commands

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "csrc/*.md", "benchmarks/*.md", "moe_unlearn/**/*.md")
    for path in ROOT.glob(pattern)
)
LANGUAGES = {"python", "sh", "yaml", "json"}
# what a block needs and this machine may lack
NEEDS = {("moe_unlearn/regress/README.md", "import triton"): "triton"}
# shell blocks build, train and start whole test runs: they are parsed, and each command is looked up, but none is run
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TEXTS = [
    "Mairi Ross kept the lighthouse of Skerry for forty years.",
    "The ferry to Skerry left at nine on Mondays.",
    "The harbour of Tarbh has two piers and one crane.",
    "A kettle boils sooner under a lid.",
]


def of(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language == language]


def named(block: Block) -> str:
    return f"{block.page}:{block.line}"


def prose(page: str) -> str:
    """Return a page without its blocks."""
    return re.sub(r"^```\w*\n.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.quick
def test_every_folder_has_its_page_and_every_block_a_language():
    folders = ("data", "metrics", "recipes", "regress", "ops", "step", "benchmark", "integrations", "delta", "audit")
    expected = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "csrc/README.md", "benchmarks/RESULTS.md"}
    assert set(PAGES) >= expected | {f"moe_unlearn/{folder}/README.md" for folder in folders}
    found = [block for page in PAGES for block in blocks(page)]
    assert {block.language for block in found} == LANGUAGES
    assert sum((ROOT / page).read_text(encoding="utf-8").count("\n```") for page in PAGES) == 2 * len(found)


# ---- Commands --------------------------------------------------------------------------------------------------


def check(words: list[str]) -> None:
    """Raise AssertionError unless the command is one that exists and takes its arguments."""
    name, *arguments = Path(words[0]).name, *words[1:]
    assert name in CHECKS, f"{words[0]} is no command of a page"
    CHECKS[name](arguments)


def check_moe_unlearn(arguments: list[str]) -> None:
    try:
        options = importlib.import_module("moe_unlearn.cli.main")._parser().parse_args(arguments)
    except (SystemExit, argparse.ArgumentError) as error:
        raise AssertionError(f"moe-unlearn {shlex.join(arguments)} is not accepted") from error
    if options.command == "run" and options.recipe in config.shipped():
        config.Recipe.load(options.recipe, options.set)
    elif options.command == "run":
        assert options.recipe.endswith(".yaml"), f"{options.recipe} is no recipe"
    if getattr(options, "model_config", None):
        assert options.model_config in config.models()


def check_make(arguments: list[str]) -> None:
    targets = " ".join(re.findall(r"^\.PHONY: (.*)", MAKEFILE, re.MULTILINE)).split()
    variables = re.findall(r"^(\w+) [?:]?=", MAKEFILE, re.MULTILINE)
    for argument in arguments:
        variable, assigned, _ = argument.partition("=")
        assert variable in (variables if assigned else targets), f"make has no {argument}"


def check_pip(arguments: list[str]) -> None:
    assert arguments[0] == "install"
    for argument in arguments[1:]:
        extras = re.fullmatch(r"(?:\.|moe-unlearn)(?:\[([\w,]+)\])?", argument)
        assert extras or argument in ("--no-build-isolation", "--editable"), argument
        unknown = set((extras and extras[1] or "").split(",")) - {""} - PROJECT["optional-dependencies"].keys()
        assert not unknown, f"there is no extra {unknown}"


def check_python(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]), f"there is no module {arguments[1]}"
    else:
        assert (ROOT / arguments[0]).is_file(), f"there is no file {arguments[0]}"
    check_pytest(arguments)


def check_torchrun(arguments: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    options = get_args_parser().parse_args(arguments)
    if options.training_script in PROGRAMS:
        assert not options.module and not options.training_script_args
        return
    assert options.module and options.training_script == "moe_unlearn", f"torchrun starts {options.training_script}"
    check_moe_unlearn(options.training_script_args)


def check_accelerate(arguments: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert arguments[0] == "launch"
    options = launch_command_parser().parse_args(arguments[1:])
    assert options.module and options.training_script == "moe_unlearn", f"it starts {options.training_script}"
    assert f"# {options.config_file}" in [block.text.splitlines()[0] for block in of("yaml")]
    check_moe_unlearn(options.training_script_args)


def check_pytest(arguments: list[str]) -> None:
    for argument in arguments:
        if argument.startswith("tests/"):
            assert (ROOT / argument).exists(), f"there is no {argument}"


# files that a page has the user make, of a block
PROGRAMS = {"train.py"}
CHECKS = {
    "accelerate": check_accelerate,
    "moe-unlearn": check_moe_unlearn,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "pytest": check_pytest,
    "torchrun": check_torchrun,
    "git": lambda arguments: None,
    "ruff": lambda arguments: None,
}


@pytest.mark.quick
@pytest.mark.parametrize("block", of("sh"), ids=named)
def test_commands_are_accepted(block):
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    for words in commands(block.text):
        check(words)


@pytest.mark.quick
@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_exist(page):
    """In a sentence arguments may be missing, but verbs, options and targets exist."""
    for text in re.findall(r"`((?:moe-unlearn|make|python -m|pip install) [^`]*)`", prose(page)):
        words = [word for word in shlex.split(text.partition(" | ")[0]) if "..." not in word]
        if words[0] == "moe-unlearn":
            check_options(words[1:])
        else:
            check(words)


def check_options(words: list[str]) -> None:
    """Raise AssertionError unless all verbs and options are known to the command line."""
    parser = importlib.import_module("moe_unlearn.cli.main")._parser()
    while verbs := [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]:
        if not words or words[0].startswith("-"):
            break
        assert words[0] in verbs[0].choices, f"moe-unlearn has no verb {words[0]}"
        parser, words = verbs[0].choices[words[0]], words[1:]
    unknown = [word for word in words if word.startswith("--") and word not in parser._option_string_actions]
    assert not unknown, f"{parser.prog} has no {unknown}"


@pytest.mark.quick
@pytest.mark.parametrize(
    "line",
    [
        "make nothing",
        "make demo NOTHING=1",
        "moe-unlearn run npo --nothing",
        "moe-unlearn run npo --set a.b=c",
        "moe-unlearn run nothing",
        "pip install .[nothing]",
        "python -m moe_unlearn.nothing",
        "torchrun --nproc-per-node 2 -m moe_unlearn run nothing",
        "torchrun --nproc-per-node 2 -m nothing",
        "torchrun --nproc-per-node 2 nothing.py",
        "accelerate launch --config_file nothing.yaml -m moe_unlearn run npo",
        "rm -rf runs",
        "python -m pytest tests/nothing.py",
    ],
)
def test_a_wrong_command_is_found(line):
    with pytest.raises((AssertionError, ValueError)):
        check(next(commands(line)))


@pytest.mark.quick
def test_a_wrong_option_in_the_text_is_found():
    check_options(["kernels", "check", "--static", "sm_90"])
    for words in (["nothing"], ["kernels", "nothing"], ["eval", "--nothing"]):
        with pytest.raises(AssertionError):
            check_options(words)


# ---- Python, YAML and JSON -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a tiny model and its tokenizer, and both of them."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = data.train_tokenizer(TEXTS, 300)
    model = tiny_olmoe(vocab_size=len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model, tokenizer


@pytest.fixture
def place(saved, tmp_path, monkeypatch):
    """Provide the files in the working folder and the names that the pages take for granted."""
    folder, model, tokenizer = saved
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_registry", {})
    monkeypatch.setattr(static_case, "_registered", {})
    for name in ("path/to/moe-model", "models/olmoe"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).symlink_to(folder)
    for side, texts in (("forget", TEXTS[:2]), ("retain", TEXTS[2:])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{side}.jsonl").write_text(lines, encoding="utf-8")
    load = config.Recipe.load

    def short(*arguments, **keywords):
        return dataclasses.replace(load(*arguments, **keywords), steps=1)

    monkeypatch.setattr(config.Recipe, "load", short)
    return {
        "model": tiny_olmoe(vocab_size=len(tokenizer)),
        "tokenizer": tokenizer,
        "TRAINER_REGISTRY": {},
        "forget_batches": random_batches(60, 2, seed=1),
        "retain_batches": random_batches(60, 2, seed=2),
        "forget": TEXTS[:1],
        "retain": TEXTS[1:2],
        "unseen": TEXTS[3:],
        "forget_rows": TEXTS[:2],
        "retain_rows": TEXTS[2:],
    }


@pytest.mark.parametrize("page", sorted({block.page for block in of("python")}))
def test_python_runs(page, place, tmp_path):
    """The blocks of a page run one after the other, each with the names of those before it."""
    names = dict(place)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a model this small waits for threads longer than it computes
    try:
        for block in (block for block in of("python") if block.page == page):
            if any(
                part in block.text and importlib.util.find_spec(of_block) is None
                for (of_page, part), of_block in NEEDS.items()
                if of_page == page
            ):
                continue
            path = tmp_path / f"block_{block.line}.py"  # a file, since some tools read the source of a function
            path.write_text(block.text, encoding="utf-8")
            names |= runpy.run_path(str(path), names)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.quick
@pytest.mark.parametrize("block", of("yaml"), ids=named)
def test_recipes_and_configurations_are_accepted(block, tmp_path):
    content = yaml.safe_load(block.text)
    if "distributed_type" in content:
        from accelerate.commands.config.config_args import load_config_from_file

        (tmp_path / "config.yaml").write_text(block.text, encoding="utf-8")
        assert load_config_from_file(str(tmp_path / "config.yaml")).fsdp_config["fsdp_version"] == 2
    else:
        assert config.Recipe.from_dict(content).name


@pytest.mark.quick
@pytest.mark.parametrize("block", of("json"), ids=named)
def test_records_are_read(block, tmp_path):
    (tmp_path / "records.jsonl").write_text(block.text, encoding="utf-8")
    assert len(data.load(tmp_path / "records.jsonl")) == len(block.text.splitlines())


# ---- Links, names of files, length -----------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("page", PAGES)
def test_links_and_names_of_files_lead_somewhere(page):
    text = prose(page)
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in link or (ROOT / page).parent.joinpath(link).exists(), link
    folders = "moe_unlearn|triton_kernels|csrc|benchmarks|tests"
    for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


@pytest.mark.quick
@pytest.mark.parametrize("page", [page for page in PAGES if page not in ("CHANGELOG.md", "benchmarks/NOTES.md")])
def test_lines_are_short(page):
    """Those of pages, that is: the two logs are as they were written."""
    text = re.sub(
        r"(<!-- \S+: begin -->).*?<!-- \S+: end -->", r"\1", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL
    )
    long = [line for line in text.splitlines() if len(line) > 120 and not line.startswith(("|", "!["))]
    assert not long


@pytest.mark.quick
def test_the_reading_order_is_five_files_with_a_line_each():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## Reading order")[2].partition("\n## ")[0]
    found = re.findall(r"^\d\. `([^`]+)` .{20,}", section, re.MULTILINE)
    assert len(found) == 5 and all((ROOT / name).is_file() for name in found)


@pytest.mark.quick
def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.quick
def test_modules_are_where_the_changelog_says():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    moved = re.findall(r"\| `(moe_unlearn\.[\w.]+)` \| `(moe_unlearn\.[\w.]+)` \|", text)
    assert len(moved) > 40
    for old, new in moved:
        assert found(new) and not found(old), (old, new)


def found(name: str) -> bool:
    """Return whether a module has this name, or a module an attribute."""
    owner, _, attribute = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(owner), attribute) or importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.quick
def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["version"] == moe_unlearn.__version__
    assert citation["license"] == PROJECT["license"] and citation["authors"] == PROJECT["authors"]
    assert [r["identifiers"][0]["value"] for r in citation["references"]] == [
        "arXiv:2606.10338",
        "arXiv:2410.17509",
        "arXiv:2412.20412",
    ]
