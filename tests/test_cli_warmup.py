"""The verb `warmup`: what it refuses, what it says and how it ends; what it compiles is in tests/regress."""

import pytest

from moe_unlearn.cli import main, warmup
from moe_unlearn.regress import beforehand
from moe_unlearn.regress.beforehand import Compiled

pytest.importorskip("triton")
pytestmark = pytest.mark.quick


def refused(capsys, *arguments: str) -> str:
    assert main(["warmup", *arguments]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    return captured.err.splitlines()[-1]


def test_without_a_gpu_one_is_named(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(beforehand.torch.cuda, "is_available", lambda: False)
    assert refused(capsys, "olmoe-1b-7b").endswith(
        "expected a GPU here, or the name of one, of a100, h100, h200, b200: --gpu h200"
    )


def test_what_is_interpreted_is_not_compiled(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "expected TRITON_INTERPRET not to be set" in refused(capsys, "olmoe-1b-7b", "--gpu", "h200")


def test_a_model_or_recipe_that_is_not_there_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET")
    folder = str(tmp_path / "cache")
    assert "no model 'x/y/z'" in refused(capsys, "x/y/z", "--gpu", "h200", "--cache", folder)
    assert "graddif" in refused(capsys, "olmoe-1b-7b", "graddif", "--gpu", "h200")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("error,code", [("", 0), ("CompilationError: too large", 1)])
def test_what_was_compiled_and_what_was_there_is_said(error, code, capsys, monkeypatch):
    made = [
        Compiled("route/_count_kernel", "", 2.5, False),
        Compiled("route/_scatter_kernel", "", 0.1, True),
        Compiled("gram/_sum_kernel", "", 0.1, False, error),
    ]
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(warmup, "calls_of", lambda model, recipe, **options: [])
    monkeypatch.setattr(warmup, "launches_of", lambda calls, target: made)
    monkeypatch.setattr(warmup, "compile_all", lambda launches, processes: iter(launches))
    assert main(["warmup", "olmoe-1b-7b", "npo", "--gpu", "a100"]) == code
    first, second, third, last = capsys.readouterr().out.splitlines()
    assert first.split() == ["route/_count_kernel", "2.5", "s"] and second.endswith(" found compiled")
    assert third.endswith(error or " 0.1 s")
    assert last.startswith(
        f"3 kernels of npo on olmoe-1b-7b for sm_80: {2 - code} compiled, 1 found compiled, {code} failed; "
    )
