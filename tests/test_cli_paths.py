"""No verb writes over what it reads."""

import argparse
import json

import pytest

from moe_unlearn.cli import main, paths
from moe_unlearn.cli.main import _parser
from tests.delta.folders import files

pytestmark = pytest.mark.quick
NEEDED = {
    "stats": ("model", "forget", "retain"),
    "mask": ("model", "forget", "retain"),
    "alternates": ("model", "forget"),
    "run": ("model", "forget", "retain"),
    "eval": ("model", "forget", "retain"),
    "audit": ("model", "before", "forget", "retain", "holdout"),
}
POSITIONAL = {
    "report": ("folders",),
    "delta": ("base", "changed"),
    "apply": ("base", "delta"),
    "revert": ("changed", "delta"),
}


def verbs():
    [subparsers] = [a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return subparsers.choices


def cases():
    for verb, (inputs, outputs, inside) in paths.VERBS.items():
        for read in inputs:
            for written in outputs:
                if (read, written) != ("sides", "repro"):  # options of two verbs of kernels
                    yield pytest.param(
                        verb, read, written, inside if written == "out" else (), id=f"{verb}-{read}-{written}"
                    )


def test_every_verb_and_every_option_that_names_a_path_is_in_the_table():
    assert paths.VERBS.keys() == verbs().keys()
    for verb, parser in verbs().items():
        found = {action.dest for action in parser._actions if action.nargs != 0}  # flags name nothing
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found |= {own.dest for sub in action.choices.values() for own in sub._actions}
        inputs, outputs, _ = paths.VERBS[verb]
        assert {*inputs, *outputs} <= found, verb
        likely = {
            "out",
            "cache",
            "json",
            "junit",
            "store",
            "repro",
            "model",
            "forget",
            "retain",
            "holdout",
            "reference",
        }
        likely |= {"before", "data", "reference_run", "classifier", "changed", "module", "sides"}
        likely -= {"model"} if verb == "show" else set()  # there it is the name of a known one
        likely |= set() if verb == "kernels" else {"base"}  # there it is a revision of git
        assert found & likely == {*inputs, *outputs} & likely, verb


@pytest.mark.parametrize(("verb", "read", "written", "inside"), [*cases()])
def test_an_output_that_is_or_lies_in_an_input_is_refused(verb, read, written, inside, tmp_path, capsys):
    for name in ("model", "other", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "x"}) + "\n", encoding="utf-8")
    for target in (tmp_path / "model", tmp_path / "model" / "x.jsonl", tmp_path / "rows.jsonl"):
        source = tmp_path / "rows.jsonl" if target.name == "rows.jsonl" else tmp_path / "model"
        if inside:  # the names that a folder gets
            source = target = tmp_path / "out"
            source = source / inside[-1]
            source.parent.mkdir(exist_ok=True)
            source.write_text("x", encoding="utf-8")
        before = files(tmp_path)
        assert main(arguments(verb, read, written, source, target, tmp_path / "other")) == 2
        told = capsys.readouterr().err
        assert "expected an output apart from what is read" in told, told
        assert files(tmp_path) == before


def arguments(verb, read, written, source, target, other):
    """The options of a verb that reads `source` as its option `read` and writes `target` as its option `written`."""
    given = dict.fromkeys((*NEEDED.get(verb, ()), *POSITIONAL.get(verb, ())), str(other)) | {read: str(source)}
    if verb == "eval" and read in ("data", "reference_run", "classifier"):
        given = {"model": str(other), "benchmark": "muse", "data": f"forget={other}", read: str(source)}
        if read == "data":
            given["data"] = f"forget={source}:train?join=true"
    if verb == "kernels":
        chosen = ["compare", str(source), str(other)] if read == "sides" else ["check", "--module", str(source)]
        return ["kernels", *chosen, f"--{written}", str(target)]
    named = [given.pop(name) for name in POSITIONAL.get(verb, ())]
    extra = {"run": ["graddiff"], "sweep": ["graddiff", "--grid=steps=1,2"]}.get(verb, [])
    if written != "out" and "out" in paths.VERBS[verb].outputs:
        given["out"] = str(target.parent / "elsewhere")
    given[written] = str(target)
    return [verb, *extra, *named, *(f"--{name.replace('_', '-')}={value}" for name, value in given.items())]
