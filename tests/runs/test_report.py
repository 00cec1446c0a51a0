"""The report: right numbers, honest verdicts, figures that draw what they say."""

import ast
import json
import math
import re
from html import escape
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from moe_unlearn import benchmark
from moe_unlearn.cli import main
from moe_unlearn.page.style import DRAWING
from moe_unlearn.runs import figures, pages, report, verdict
from moe_unlearn.runs import summary as summaries
from moe_unlearn.runs.summary import RUNS, summarise, table

RESULTS = {
    "target": {"verbmem_f": 1.0, "verbmem_r": 1.0, "nll_f": 0.1, "nll_r": 0.1, "privleak": -100.0},
    "retrain": {"verbmem_f": 0.1, "verbmem_r": 1.0, "nll_f": 8.0, "nll_r": 0.1, "privleak": 0.0},
    "npo": {"verbmem_f": 0.3, "verbmem_r": 0.9, "nll_f": 4.0, "nll_r": 0.4, "privleak": -30.0},
    "trace": {"verbmem_f": 0.3, "verbmem_r": 0.9, "nll_f": 4.0, "nll_r": 0.4, "privleak": -30.0},
    "wagle": {"verbmem_f": 0.5, "verbmem_r": 0.9, "nll_f": 4.0, "nll_r": 0.4, "privleak": -30.0},
    "combined": {"verbmem_f": 0.12, "verbmem_r": 0.97, "nll_f": 7.5, "nll_r": 0.2, "privleak": 4.0},
}
ROUTING = {
    "forget": torch.tensor([[1.0, 0.5, 0.5], [0.2, 0.9, 0.9]]),
    "retain": torch.tensor([[0.5, 0.75, 0.75], [0.0, 1.0, 1.0]]),
    "selected": torch.tensor([[True, False, False], [False, False, False]]),
}


def shifted(by):
    return {run: {**m, "verbmem_f": m["verbmem_f"] + by.get(run, 0.0)} for run, m in RESULTS.items()}


def text_of(results, routing=None):
    summary = summarise(results)
    content = report.Content(summary, "builtin:x", {str(seed): r for seed, r in results.items()}, {}, routing or {})
    return pages.of(content).markdown()


@pytest.mark.quick
def test_mean_and_spread():
    summary = summarise({3: {"a": {"x": 1.0, "y": 5.0}}, 4: {"a": {"x": 3.0}}})
    assert summary == {"a": {"x": 2.0, "x_sd": pytest.approx(math.sqrt(2))}}
    assert summarise({0: RESULTS}) == RESULTS


@pytest.mark.quick
def test_table_aligns_orders_and_marks_what_is_missing():
    summary = {"mine": {"verbmem_f": math.nan}, "retrain": {"verbmem_f": 0.25}, "target": {"nll_f": 2.0}}
    lines = table(summary).splitlines()
    assert [line.split()[0] for line in lines] == ["run", "target", "retrain", "mine"]
    assert lines[1].split()[-2:] == ["–", "2.00"] and "0.250" in lines[2] and "nan" not in lines[3]
    assert len({len(line) for line in table(summary, markdown=True).splitlines()}) == 1
    assert "KnowMem" not in lines[0]  # a column nobody has
    spread = table({"npo": {"verbmem_f": 0.5, "verbmem_f_sd": 0.0625}})
    assert "0.500 ± 0.062" in spread


@pytest.mark.quick
def test_the_verdict_says_which_lever_helps_and_which_does_not():
    text = text_of({0: RESULTS})
    assert "One seed (0): no spread is known." in text
    assert "* TRACE (where in the data) **does not help" in text
    assert "* WAGLE (where in the model) **hurts**" in text
    assert "* all three **helps**: distance shorter by +0.1" in text
    kept = "VerbMem gone, PrivLeak gone, NLL gone; 97.0% of retain VerbMem kept"
    assert f"* three levers: {kept}: **reached**" in text
    kept = "VerbMem present, PrivLeak present, NLL present; 90.0% of retain VerbMem kept"
    assert f"* NPO: {kept}: **not reached**" in text


@pytest.mark.quick
def test_a_gain_within_the_spread_is_no_gain():
    noisy = {0: shifted({"trace": -0.15}), 1: shifted({"trace": 0.1}), 2: shifted({})}
    assert "TRACE (where in the data) **does not help" in text_of(noisy)
    steady = {0: shifted({"trace": -0.15}), 1: shifted({"trace": -0.14}), 2: shifted({"trace": -0.16})}
    assert "TRACE (where in the data) **helps**" in text_of(steady)
    # a spread common to both runs of a seed cancels
    paired = {s: shifted({"npo": b, "trace": b - 0.05}) for s, b in enumerate((0.0, 0.2, 0.4))}
    assert "TRACE (where in the data) **helps**" in text_of(paired)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("verbmem_f", 0.21, "VerbMem present"),
        ("verbmem_f", -0.01, "VerbMem overshot"),
        ("privleak", -10.5, "PrivLeak present"),
        ("privleak", 10.5, "PrivLeak overshot"),
        ("nll_f", 7.2, "NLL present"),
        ("nll_f", 8.8, "NLL overshot"),
        ("verbmem_r", 0.94, "94.0% of retain VerbMem kept"),
    ],
)
def test_one_metric_away_from_retrain_is_enough_for_not_reached(key, value, word):
    text = text_of({0: RESULTS | {"combined": RESULTS["combined"] | {key: value}}})
    line = next(line for line in text.splitlines() if line.startswith("* three levers: "))
    assert word in line and line.endswith("**not reached**.")


@pytest.mark.quick
@pytest.mark.parametrize(("verdict", "reached"), [("gone", "reached"), ("hidden", "not reached")])
def test_an_audit_of_a_run_counts_and_is_shown(tmp_path, verdict, reached):
    rows = [["rounding", "to int4 | nf4", "98 % [90, 99] by VerbMem, int4", verdict]]
    audit = {"run": "combined", "verdict": verdict, "summary": "Some words.", "rows": rows}
    report.save(tmp_path, report.Content(RESULTS, audit=audit))
    text = pages.of(report.read(tmp_path)).markdown()
    assert f"97.0% of retain VerbMem kept; audit {verdict}: **{reached}**." in text
    assert f"## Audit of three levers: {verdict}\n\nSome words. [The whole report](audit/AUDIT.md)" in text
    assert re.search(
        rf"\| rounding +\| to int4 \\\| nf4 +\| 98 % \\\[90, 99\\\] by VerbMem, int4 \| \*\*{verdict}\*\* +\|", text
    )


@pytest.mark.quick
def test_a_demo_ends_with_the_verdict_of_each_run_and_lever(tmp_path, monkeypatch, capsys):
    def made(corpus, seeds, out, command):
        audit = {"run": "combined", "verdict": "hidden", "summary": "", "rows": []}
        report.save(out, report.Content(RESULTS, results={0: RESULTS}, audit=audit))
        return RESULTS

    monkeypatch.setattr(benchmark, "demo", made)
    assert main(["demo", "--out", str(tmp_path), "--quiet"]) == 0
    lines = capsys.readouterr().out.partition("report.json\n\n")[2].splitlines()
    words = "VerbMem gone, PrivLeak gone, NLL gone; 97.0% of retain VerbMem kept; audit hidden: not reached."
    assert f"three levers: {words}" in lines and "WAGLE (where in the model) hurts" in "\n".join(lines)


@pytest.mark.quick
def test_a_missing_reference_is_said():
    text = text_of({0: {run: RESULTS[run] for run in ("target", "npo", "trace")}})
    assert "The reference run is missing" in text and "reached" not in text


@pytest.mark.quick
def test_inactive_trace_is_said():
    routing = {key: table.tolist() for key, table in ROUTING.items()}
    assert "forget-critical experts (1): layer 0 expert 0 (1.000 of forget, 0.500" in text_of({0: RESULTS}, routing)
    routing["selected"] = [[False] * 3] * 2
    assert "**TRACE inactive**: no forget-critical expert." in text_of({0: RESULTS}, routing)
    routing["inactive"] = "the highest ratio is 1.240"
    assert "**TRACE inactive**: the highest ratio is 1.240." in text_of({0: RESULTS}, routing)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", None, "summary.json: no such file"),
        ("summary.json", "{", "summary.json: expected JSON"),
        ("summary.json", "[]", "summary.json: expected a JSON object; got list"),
        ("summary.json", "{}", "run name -> metrics"),
        ("summary.json", '{"npo": 3}', "run name -> metrics"),
        ("summary.json", "[" * 100_000, "summary.json: expected JSON"),
        *(
            ("summary.json", f'{{"npo": {{"nll_f": {v}}}}}', "metrics, which are numbers")
            for v in ('"x"', "[1]", "true")
        ),
        ("summary.json", '{"retrain": {"verbmem_f": 1}}', "summary.json: expected verbmem_r of retrain"),
        ("seeds.json", '{"results": {"1": {"npo": 1}}}', "seeds.json: expected corpus, a text, and results"),
        ("trajectory.json", '{"npo": [1]}', "trajectory.json: expected run name -> a list of objects"),
        ("routing.json", "nonsense", "routing.json: expected JSON"),
        ("routing.json", '{"forget": [[1]], "retain": [[1]]}', "routing.json: .* it lacks 'selected'"),
        (
            "routing.json",
            '{"forget": [[1]], "retain": [[1]], "selected": [[1]]}',
            "routing.json: expected an object of",
        ),
        (
            "routing.json",
            '{"forget": [[1]], "retain": [[1]], "selected": [[true, true]]}',
            "routing.json: expected rows of one length",
        ),
        ("batch.json", '{"ranks": 1, "accumulate": 1}', "batch.json: expected the keys .*; it lacks 'batch_size'"),
        ("batch.json", '{"ranks": 1, "batch_size": "8", "accumulate": 1}', "batch.json: expected whole numbers"),
        (
            "loaded.json",
            '{"model": "m", "dtype": "d", "device": "cpu", "trust_remote_code": "no"}',
            "loaded.json: expected texts, and true or false",
        ),
        ("loaded.json", '{"model": "m", "dtype": "d", "device": "cpu"}', "json: .* it lacks 'trust_remote_code'"),
        ("audit.json", '{"run": "npo", "verdict": "gone"}', "audit.json: expected the keys .*; it lacks 'summary'"),
        (
            "audit.json",
            '{"run": "npo", "verdict": "gone", "summary": "", "rows": [1]}',
            "audit.json: expected texts, and rows of texts",
        ),
    ],
)
def test_bad_folders_are_named(tmp_path, name, content, message):
    (tmp_path / "summary.json").write_text(json.dumps(RESULTS), encoding="utf-8")
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        report.read(tmp_path)


def content():
    steps = [{"step": i, "nll_f": 0.1 + i, "nll_r": 0.1 + 0.1 * i, "note": "x"} for i in range(3)]
    results = {0: RESULTS, 1: RESULTS}
    routing = {key: table.tolist() for key, table in ROUTING.items()}
    return report.Content(summarise(results), "builtin:x", results, {"npo": steps}, routing)


def test_a_demo_folder_is_complete_and_can_be_rebuilt(tmp_path):
    report.save(tmp_path, content())
    written, summary = report.write(tmp_path, content()), content().summary
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8")) == summary
    assert summary["npo"]["verbmem_f"] == pytest.approx(0.3) and summary["npo"]["verbmem_f_sd"] == 0
    first = (tmp_path / "report.md").read_text(encoding="utf-8")
    (tmp_path / "report.md").unlink()
    assert report.write(tmp_path, report.read(tmp_path)) == written
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == first
    drawn = {"pareto.svg", "trajectories.svg", "experts.svg"}
    assert {p.name for p in written} == drawn | {*report.PAGES}
    for name in drawn:
        assert f"](figures/{name})" in first
        ElementTree.parse(tmp_path / "figures" / name)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["summary"] == summary


def test_only_what_there_is_gets_drawn(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"npo": {"verbmem_f": 0.2, "verbmem_r": 0.9}}), encoding="utf-8")
    (tmp_path / "trajectory.json").write_text('{"npo": [{"step": 1, "forget_loss": 3.0}]}', encoding="utf-8")
    written = report.write(tmp_path, report.read(tmp_path))
    assert written == [tmp_path / name for name in (*report.PAGES, "figures/losses.svg")]  # one run is no frontier
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "KnowMem" not in text and "PrivLeak" not in text.partition("## Verdict")[0]  # nobody has them


def texts_of(drawing):
    """Every text of a drawing, with the box that it takes at the most."""
    root = ElementTree.fromstring(f"<svg>{''.join(drawing.parts)}</svg>")
    for own in root.iter("text"):
        x, y, long = float(own.get("x")), float(own.get("y")), 5.2 * len(own.text or "")
        left = x - long * {"middle": 0.5, "end": 1.0}.get(own.get("text-anchor"), 0.0)
        yield own.text, (left, y - 9, left + long, y + 2)


def test_no_two_texts_of_a_figure_overlap():
    runs = {run: RESULTS["npo"] for run in RUNS}
    steps = [{"step": i, "nll_f": 0.1 + i, "nll_r": 0.1 + i} for i in range(3)]
    wide = {k: torch.rand(24, 128).tolist() for k in ("forget", "retain")}
    wide["selected"] = (torch.rand(24, 128) > 0.9).tolist()
    drawn = [
        *figures.frontier(runs),
        *figures.trajectories(dict.fromkeys(RUNS, steps), runs),
        *figures.experts(wide, {}),
    ]
    assert [figure.name for figure in drawn] == ["pareto", "trajectories", "experts"]
    for drawing in [own for figure in drawn for own in figure.drawings]:
        boxes = list(texts_of(drawing))
        assert len(boxes) > 8
        for i, (text, box) in enumerate(boxes):
            assert -1 <= box[0] and box[2] <= drawing.width + 1, f"{text!r} leaves the figure"
            for other, second in boxes[:i]:
                apart = box[0] >= second[2] or second[0] >= box[2] or box[1] >= second[3] or second[1] >= box[3]
                assert apart, f"{text!r} overlaps {other!r}"


def test_figures_show_the_data():
    (figure,) = figures.experts({key: table.tolist() for key, table in ROUTING.items()}, {})
    assert len(figure.drawings) == 3 and all(own.inline().count('class="chosen"') == 1 for own in figure.drawings)
    first = figure.drawings[0].inline()
    assert first.count("<title>") == 6 and "layer 1, expert 0: 0.2</title>" in first
    assert "layer 1, expert 0: 3</title>" in figure.drawings[2].inline()  # retain never goes there: cut, not infinite
    (figure,) = figures.frontier(summarise({0: RESULTS, 1: shifted({"npo": 0.1})}))
    assert "Bars" in figure.caption and "Shaded" in figure.caption
    whole, near = (own.inline() for own in figure.drawings)
    assert "target (to unlearn): 1.000" in whole and "target (to unlearn)" not in near
    (figure,) = figures.frontier(dict.fromkeys(("target", "npo", "trace"), RESULTS["npo"]))  # where the others are
    assert ["target (to unlearn)" in own.inline() for own in figure.drawings] == [True, False]


def test_what_lies_below_another_run_is_seen_and_what_leaves_the_frame_has_an_arrow():
    """Three runs on one point have three names apart and hollow markers of three shapes."""
    spread = {"verbmem_f_sd": 0.9, "verbmem_r_sd": 0.0}
    runs = {run: RESULTS["npo"] | spread for run in ("npo", "trace", "wagle")}
    (figure,) = figures.frontier(runs)
    (drawing,) = figure.drawings
    drawn = drawing.inline()
    for name in ("NPO", "TRACE", "WAGLE"):
        assert [text for text, _ in texts_of(drawing)].count(name) == 2  # at the point and in the legend
    assert drawn.count('class="arrow"') == 6 and "fill-opacity: .6" in DRAWING
    shapes = re.findall(r'<(circle|polygon) class="point" (?:c|points=)[^/]*', drawn)
    assert len({*re.findall(r'class="point"[^>]*points="([^"]*)"', drawn)}) >= 2 and "circle" in shapes


@pytest.mark.quick
def test_texts_of_others_say_nothing_in_either_language():
    hostile = "</td><script>alert(1)</script> | **x** [y](javascript:z) `c` \x00 &lt; <img src=x onerror=alert(1)>\n# h"
    hostile += "\u202e0.1"  # turns round what follows
    summary = {"target": RESULTS["target"], hostile: RESULTS["npo"]}
    sample = {"prompt": hostile, "truth": hostile, "before": hostile, "after": hostile}
    about = {"command": hostile, "started": hostile, "seed": 0, "machine": hostile, "versions": {hostile: hostile}}
    loaded = {"model": hostile, "dtype": "d", "device": "cpu", "trust_remote_code": False}
    data = {hostile: {"source": hostile, "dropped": {hostile: 1}}}
    routing = {key: table.tolist() for key, table in ROUTING.items()} | {"inactive": hostile}
    audit = {"run": hostile, "verdict": hostile, "summary": hostile, "rows": [[hostile] * 4]}
    made = pages.of(
        report.Content(
            summary, hostile, {hostile: summary}, {hostile: [{"step": 1, "forget_loss": 1.0}]}, routing,
            loaded=loaded, about=about, data=data, samples={"forget": [sample], hostile: [sample]}, audit=audit,
            recipe=f"```\n{hostile}",
        )
    )  # fmt: skip
    page, text = made.html(), made.markdown()
    assert not {"\u202e", "\x00"} & {*page, *text}
    body = page[page.index("<body>") :].replace("</html>\n", "")
    ElementTree.fromstring(body)  # every tag is closed
    assert "<script" not in body and "<img" not in body and "href=" not in body.replace('href="audit/AUDIT.md"', "")
    assert "javascript:" not in re.sub(r">[^<]*<", "><", body).replace(escape("[y](javascript:z)"), "")
    outside = re.sub(r"^````.*?^````", "", text, flags=re.MULTILINE | re.DOTALL)
    outside = re.sub(r"`` .*? ``", "", outside)
    assert not re.search(r"(?<!\\)<(?!br>)|(?<!\\)\[y|^# h", outside, re.MULTILINE)


@pytest.mark.parametrize("module", [summaries, figures, pages, report, verdict], ids=lambda module: module.__name__)
def test_importing_the_report_imports_neither_torch_nor_transformers(module):
    body = ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body
    names = {node.module for node in body if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
    assert names and not {"transformers", "torch"} & {name.partition(".")[0] for name in names}
    ours = {name for name in names if name.startswith("moe_unlearn")}
    assert all(re.match(r"moe_unlearn\.(files|page|runs)\b", name) for name in ours)
