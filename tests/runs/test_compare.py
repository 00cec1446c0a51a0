"""Runs beside each other: what they share is one row, what differs is named, and every format has the same numbers."""

import csv
import json
import re

import pytest

from moe_unlearn.cli import main
from moe_unlearn.page.exports import comma_separated, latex
from moe_unlearn.runs.compare import FORMATS, Comparison

pytestmark = pytest.mark.quick
TARGET = {"verbmem_f": 1.0, "verbmem_r": 0.9, "nll_f": 0.1}


@pytest.fixture
def folders(tmp_path):
    made = []
    for name, lr, forget in (("one", "1e-5", 0.25), ("two_2", "3e-5", 0.125)):
        folder = tmp_path / name
        folder.mkdir()
        run = {"verbmem_f": forget, "verbmem_r": 0.8, "nll_f": 2.0, "nll_f_low": 1.5, "nll_f_high": 2.5, "seconds": 3.0}
        (folder / "summary.json").write_text(json.dumps({"target": TARGET, "npo": run}), encoding="utf-8")
        (folder / "recipe.yaml").write_text(f"name: npo\nsteps: 5\noptimizer: {{lr: {lr}}}\n", encoding="utf-8")
        made.append(folder)
    return made


def test_what_runs_share_is_one_row_and_what_differs_is_named(folders):
    compared = Comparison(folders)
    assert list(compared.summary) == ["target", "one (NPO)", "two_2 (NPO)"]
    assert compared.differences().rows == [["optimizer.lr", "1e-5", "3e-5"]]
    text = compared.page().markdown()
    assert "| one (NPO)" in text and "](figures/pareto.svg)" in text
    changed = json.loads((folders[1] / "summary.json").read_text(encoding="utf-8")) | {
        "target": TARGET | {"nll_f": 0.2}
    }
    (folders[1] / "summary.json").write_text(json.dumps(changed), encoding="utf-8")
    names = list(Comparison(folders).summary)
    assert names == ["one (target (to unlearn))", "one (NPO)", "two_2 (target (to unlearn))", "two_2 (NPO)"]


def test_every_format_is_written(folders, tmp_path, capsys):
    files = {kind: tmp_path / "out" / f"table.{kind}" for kind in FORMATS}
    given = [part for kind, path in files.items() for part in (f"--{kind}", str(path))]
    assert main(["report", *map(str, folders), *given]) == 0
    told = capsys.readouterr().out
    assert "one (NPO)" in told and str(files["latex"]) in told
    rows = list(csv.DictReader(files["csv"].read_text(encoding="utf-8").splitlines()))
    assert [row["run"] for row in rows] == ["target", "one (NPO)", "two_2 (NPO)"]
    assert rows[2]["verbmem_f"] == "0.125" and rows[2]["nll_f_high"] == "2.5" and rows[0]["nll_f_high"] == ""
    tabular = files["latex"].read_text(encoding="utf-8")
    assert r"two\_2 (NPO)" in tabular and r"2.00 {[}1.50, 2.50{]} \\" not in tabular.splitlines()[0]
    assert tabular.startswith("\\begin{tabular}{lrrrr}\n\\toprule\nrun & VerbMem forget $\\downarrow$ & ")
    assert json.loads(files["json"].read_text(encoding="utf-8"))["recipes"]["one (NPO)"]["steps"] == 5
    assert "<svg" in files["html"].read_text(encoding="utf-8")
    assert (tmp_path / "out" / "figures" / "pareto.svg").is_file()


def test_what_cannot_be_compared_is_refused_before_anything_is_written(folders, tmp_path, capsys):
    out = ["--csv", str(tmp_path / "table.csv")]
    for more, message in (
        ([str(folders[0])], "expected each run once"),
        ([str(tmp_path / "none")], "summary.json: no such file"),
    ):
        assert main(["report", *map(str, folders), *more, *out]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "table.csv").exists()
    assert main(["report", *map(str, folders), "--csv", str(folders[0] / "summary.json")]) == 2
    assert "expected an output apart from what is read" in capsys.readouterr().err


def test_names_are_no_formulas_and_no_commands():
    assert comma_separated(["run", "x"], [["=1+1", -2.5], ['a,"b', ""]]) == 'run,x\n\'=1+1,-2.5\n"a,""b",\n'
    cells = latex(["a"], [["\\input{x} & 50 % [1] _ ± → <b|"]]).splitlines()[4]
    written = r"\textbackslash{}input\{x\} \& 50 \% {[}1{]} \_ $\pm$ $\to$ \textless{}b\textbar{}"
    assert cells == written + r" \\"
    assert not re.search(r"(?<!\\)[%&_#]", latex(["%&_#"], [["%&_#"]]).replace("\n", ""))
