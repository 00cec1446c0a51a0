"""`moe-unlearn kernels`: a foreign kernel is recorded, broken and caught; every verb and every exit code."""

import json
import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest

from moe_unlearn import cli
from moe_unlearn.regress import case as registry
from moe_unlearn.regress import static
from moe_unlearn.regress.report import Result
from moe_unlearn.regress.store import Store
from moe_unlearn.testing import AccuracyError, criterion, described
from tests.support.foreign_softmax import BROKEN, REORDERED, RIGHT, example


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_registry", {})
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def package(tmp_path):
    """A scratch package with the foreign kernel; a function that rewrites its last line."""
    path = tmp_path / "test_softmax.py"

    def write(body=RIGHT, **changes):
        text = example().replace(RIGHT, body)
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")

    write()
    return write


def kernels(*arguments):
    return cli.main(["kernels", *arguments])


def softmax(verb, *arguments):
    return kernels(verb, "--module", "test_softmax.py", *arguments)


@pytest.mark.quick
@pytest.mark.slow
def test_a_foreign_kernel_is_recorded_broken_and_caught(package, capsys):
    assert softmax("check") == 2
    assert "there is no record of it" in capsys.readouterr().out
    assert softmax("record") == 0 and softmax("check") == 0
    printed = capsys.readouterr().out
    assert "1 cases: 1 equal" in printed
    assert re.search(r"criterion on .+: largest error / bound 0\.\d+ in 1\d\d correct results", printed)
    (entry,) = Store("kernel_store").current().values()
    assert entry.content["yardstick"] == described()
    package(REORDERED)
    assert softmax("check") == 0
    assert re.search(r"as accurate +softmax +error [\d.]+ x", capsys.readouterr().out)
    assert softmax("check", "--strict") == 1
    assert "other bits in output 0" in capsys.readouterr().out
    package(BROKEN)
    assert softmax("check") == 1
    assert "repro: kernel_repros/repro_softmax.py" in capsys.readouterr().out
    with pytest.raises(AccuracyError):
        runpy.run_path("kernel_repros/repro_softmax.py")
    package()
    runpy.run_path("kernel_repros/repro_softmax.py")
    assert "not wrong any more" in capsys.readouterr().out


def test_a_loss_that_only_the_record_shows(package, capsys, monkeypatch):
    """More accurate than plain PyTorch was recorded; plain PyTorch is a loss, and its script reads the record.

    Of a reference whose roundings cannot be seen, that is: those of a softmax would allow for it.
    """
    real = criterion.margin
    monkeypatch.setattr(criterion, "margin", lambda actual, value, gold, rounded=None: real(actual, value, gold))
    package("(e.double() / e.double().sum(-1, keepdim=True)).float()")
    package("torch.softmax(x.double(), -1).float()")
    assert softmax("record") == 0
    package("torch.softmax(x, -1)")
    assert softmax("check") == 1
    script = Path("kernel_repros/repro_softmax.py").read_text(encoding="utf-8")
    assert "as recorded" in script and "rows=64, columns=1000" in script
    with pytest.raises(AccuracyError):
        runpy.run_path("kernel_repros/repro_softmax.py")


def test_a_record_that_is_nearly_exact_is_no_trap(package, capsys):
    package("torch.softmax(x.double(), -1).float()")
    assert softmax("record") == 0
    package("torch.softmax(x, -1)")
    assert softmax("check") == 0 and "as accurate" in capsys.readouterr().out


def test_record_never_overwrites_and_accept_keeps_the_former(package, capsys):
    assert softmax("record") == 0 and softmax("record") == 0
    assert "1 unchanged" in capsys.readouterr().out
    files = {p: p.read_bytes() for p in Path("kernel_store").rglob("*") if p.is_file()}
    package(REORDERED)
    assert softmax("record") == 2
    assert "recorded differently" in capsys.readouterr().out
    assert files == {p: p.read_bytes() for p in Path("kernel_store").rglob("*") if p.is_file()}
    assert softmax("accept", "--reason", "sums from the other end") == 2
    assert "accept expects the names" in capsys.readouterr().err
    assert softmax("accept", "softmax", "--reason", " ") == 2
    assert softmax("accept", "softmax", "--reason", "sums from the other end") == 0
    assert softmax("check", "--strict") == 0
    assert all(p.read_bytes() == data for p, data in files.items())
    capsys.readouterr()
    assert kernels("report") == 0
    out = capsys.readouterr().out
    assert "superseded the former: sums from the other end" in out and "1 cases, 2 records, all whole" in out
    package(BROKEN)
    assert softmax("accept", "softmax", "--reason", "no") == 1
    assert "wrong by its own reference" in capsys.readouterr().out


def test_other_inputs_are_no_regression(package, capsys):
    assert softmax("record") == 0
    package(generator="generator", **{"manual_seed(seed)": "manual_seed(seed + 1)"})
    assert softmax("check") == 3
    assert "seed 0 gives other values of x" in capsys.readouterr().out
    package(**{'"rows": 64': '"rows": 65'})
    assert softmax("check") == 2
    assert "sizes {'rows': 64, 'columns': 1000} -> {'rows': 65" in capsys.readouterr().out
    assert softmax("accept", "softmax", "--reason", "one more row") == 0 and softmax("check") == 0


def test_a_case_that_disappeared(package, capsys):
    assert softmax("record") == 0
    package(**{'Case("softmax"': 'Case("soft"'})
    assert softmax("record") == 0
    assert softmax("check") == 2
    assert "the case is not there any more" in capsys.readouterr().out
    assert softmax("check", "soft") == 0


def test_a_corrupt_store(package, capsys):
    assert softmax("record") == 0
    (arrays,) = Path("kernel_store/arrays").iterdir()
    arrays.write_bytes(arrays.read_bytes()[:-1])
    for verb in (lambda: softmax("check"), lambda: kernels("report")):
        assert verb() == 4
        assert f"corrupt store: {arrays}: content does not match its SHA-256" in capsys.readouterr().err


def test_kernels_that_fail(package, capsys):
    assert softmax("record") == 0
    package("e.view(3)")
    assert softmax("check", "--junit", "out/junit.xml", "--json", "out/results.json") == 1
    assert "shape '[3]' is invalid" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="invalid"):
        runpy.run_path("kernel_repros/repro_softmax.py")
    suite = ElementTree.parse("out/junit.xml").getroot()
    assert suite.attrib["failures"] == "1" and suite.find("testcase/failure").attrib["type"] == "failed"
    made = json.loads(Path("out/results.json").read_text(encoding="utf-8"))
    assert made["exit_code"] == 1 and made["results"][0]["status"] == "failed" and made["environment"]["torch"]
    package("x.add_(1)")
    assert softmax("check") == 1
    assert "changed its input x" in capsys.readouterr().out
    package(**{"torch.softmax(x, -1)": "1 / 0"})
    assert softmax("check") == 2
    assert "its reference fails: ZeroDivisionError" in capsys.readouterr().out


def test_json_alone_on_standard_output(package, capsys):
    softmax("record", "--json", "-")
    captured = capsys.readouterr()
    assert json.loads(captured.out)["results"][0]["status"] == "recorded" and "1 recorded" in captured.err
    assert kernels("report", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)[0]["case"] == "softmax"
    assert kernels("report", "--markdown") == 0
    assert capsys.readouterr().out.startswith("| case | recorded |")


@pytest.mark.quick
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["check", "--impl", "fast"], "--impl must be auto or one of"),
        (["check", "nothing*"], "no case matches nothing*"),
        (["check", "--module", "absent.py"], "--module expects a Python file; got"),
        (["compare", "ref"], "compare expects A and B"),
        (["compare", "ref", "fast"], "expected auto, .* or a file FILE.py; got 'fast'"),
        (["report"], "there is no store 'kernel_store'"),
        (["record", "--static", "sm_90"], "record --static expects --module"),
    ],
)
def test_bad_use(arguments, message, capsys):
    assert kernels(*arguments) == 2
    assert re.search(message.replace("*", r"\*") if "nothing" in message else message, capsys.readouterr().err)


def test_ours(capsys):
    assert kernels("record", "--speed", "gram/*", "route/*") == 0
    assert kernels("list", "route/*", "--tag", "skewed") == 0
    assert "1 cases, 1 of them recorded" in capsys.readouterr().out
    assert kernels("check", "--impl", "ref", "gram/*", "route/*") == 0
    assert kernels("check", "--speed", "route/skewed") == 0
    assert re.search(r"recorded \d+ us, now \d+ us \([\d.]+ x, of two runs\)", capsys.readouterr().out)
    entry = Store("kernel_store").current()["gram/masked/float32"]
    assert entry.content["origin"] == "moe_unlearn.regress.ours" and len(entry.content["seconds"]) == 7


def test_speed_of_another_device_is_not_compared(package, capsys, monkeypatch):
    assert softmax("record", "--speed") == 0
    there = {"torch": "1.0", "cpu": "another"}
    monkeypatch.setattr("moe_unlearn.regress.verbs.fingerprint", lambda device: there)
    assert softmax("check", "--speed") == 0
    assert re.search(r"not comparable, .*cpu: .* -> another", capsys.readouterr().out)


def test_compare(package, capsys):
    Path("old.py").write_text(example(), encoding="utf-8")
    package("(x.sort(-1), e / e.sum(-1, keepdim=True))[1]")
    assert kernels("compare", "old.py", "test_softmax.py") == 1
    assert re.search(r"slower +softmax\n +slower: [\d.]+ x base", capsys.readouterr().out)
    package(BROKEN)
    assert kernels("compare", "old.py", "test_softmax.py") == 1
    assert "suppressed: the results are wrong" in capsys.readouterr().out
    assert kernels("compare", "ref", "auto", "--case", "route/*", "--no-speed") == 0


def test_a_kernel_that_fools_the_clock_is_not_timed(package, capsys):
    Path("old.py").write_text(example(), encoding="utf-8")
    package(
        "seen.setdefault(x.data_ptr(), e / e.sum(-1, keepdim=True))", **{"import torch\n": "import torch\nseen = {}\n"}
    )
    assert kernels("compare", "old.py", "test_softmax.py") == 1
    assert "its speed is not measured: cached result" in capsys.readouterr().out


def test_against_a_revision(package, capsys, monkeypatch):
    def compared(base, **options):
        assert base == "HEAD~1" and options["modules"] == ["test_softmax.py"] and options["patterns"] == ["s*"]
        options["say"]("building")
        return [Result("softmax", "slower", speed="slower: 1.2 x base")]

    monkeypatch.setattr("moe_unlearn.regress.revision.compare", compared)
    assert softmax("compare", "--base", "HEAD~1", "--case", "s*") == 1
    captured = capsys.readouterr()
    assert "slower: 1.2 x base" in captured.out and "building" in captured.err
    assert softmax("compare", "a", "b", "--base", "HEAD") == 2
    assert "either A and B or --base REV" in capsys.readouterr().err


@pytest.mark.parametrize("problems, code", [([], 0), (["triton sm_90 route/x: registers 32 -> 40"], 1)])
def test_static(package, capsys, monkeypatch, problems, code):
    def measured(verb):
        def call(architectures, kernels, ledger, *, modules):
            assert (architectures, kernels) == (["sm_90"], ["route*"])
            assert (ledger, modules) == (
                (Path("kernel_store/static.json"), ["x.py"]) if verb == "record" else (None, [])
            )
            return static.Report({}, problems, ["a note"], compared=1)

        return call

    for verb in ("check", "record"):
        monkeypatch.setattr(static, verb, measured(verb))
    assert kernels("check", "route*", "--static", "sm_90", "--json", "out.json") == code
    assert kernels("record", "route*", "--static", "sm_90", "--module", "x.py") == code
    out = capsys.readouterr().out
    assert "note: a note" in out and all(problem in out for problem in problems)
    assert json.loads(Path("out.json").read_text(encoding="utf-8"))["exit_code"] == code


def test_selftest_gives_its_exit_code(monkeypatch):
    seen = []
    monkeypatch.setattr("moe_unlearn.regress.selftest.main", lambda arguments: seen.append(arguments) or 1)
    assert kernels("selftest", "--comparisons", "5", "--real", "2") == 1
    assert seen == [["--comparisons=5", "--real", "--seconds=2.0"]]
