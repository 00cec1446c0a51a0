"""README's table and the pictures are what the recorded runs say, and stale figures are marked."""

import json

import pytest

from benchmarks import plots, readme, record, stamp


def row(op, name, value, target, **more):
    verdict = {"what": "times as fast as rival", "value": value, "target": target, "hit": value >= target,
               "low": value - 0.1, "high": value + 0.1}  # fmt: skip
    return {"op": op, "name": name, "missing": {"peer": "its kernels need a GPU"}, "verdicts": [verdict],
            "milliseconds": {"ours": 1.0, "rival": value}, **more}  # fmt: skip


@pytest.fixture
def root(tmp_path):
    for name in ("triton_kernels/gram.py", "csrc/cpu/gram.cpp", "csrc/cuda/gram.cuh"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("first\n", encoding="utf-8")
    layer = [
        row("expert_layer", f"{t} tokens, {s}", 2.0, 1.0, geometry="g", tokens=t, share=s, dtype="bfloat16",
            flops=1e9 * t, bytes=1e8, extra_mib={"ours": 1.0, "rival": 3.0})
        for t, s in ((256, 0.2), (512, 0.2), (1024, 0.2), (1024, 1.0))
    ]  # fmt: skip
    run = {
        "stamp": {"device": "cpu", "commit": "0123456789ab"},
        "fingerprint": {"device": "cpu", "cpu": "A CPU", "native": "avx2", "threads": "1", "torch": "2.13"},
        "kernels": stamp.kernel_sources_hash(tmp_path, device="cpu"), "time": "processor",
        "ceilings": {"flops": {"bfloat16": 1e11}, "bytes": 1e10}, "state": record.COMPLETE, "started": 1,
        "rows": [*layer, row("route", "T 64", 0.9, 1.0), {"op": "gram", "name": "m", "skipped": "no time"}],
    }  # fmt: skip
    path = tmp_path / "benchmarks/results/cpu/2026-01-02-012345678.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(run), encoding="utf-8")
    return tmp_path


def text(root):
    return readme.generated(root / "benchmarks/results", root)


@pytest.mark.quick
def test_the_table_has_hits_misses_and_reasons(root):
    found = text(root)
    assert "| route: T 64 | times as fast | rival | 0.90 [0.80, 1.00] | 1 | **missed** |" in found
    assert "2.00 [1.90, 2.10] | 1 | hit |" in found
    assert "Not measured, its kernels need a GPU: peer." in found
    assert "Left out for lack of time: gram: m." in found
    assert readme.STALE not in found and "speedup.png" not in found


@pytest.mark.parametrize("name,marked", [("csrc/cpu/gram.cpp", True), ("csrc/cuda/gram.cuh", False),
                                         ("triton_kernels/gram.py", False)])  # fmt: skip
def test_a_kernel_of_that_device_that_changed_marks_the_table(root, name, marked):
    (root / name).write_text("second\n", encoding="utf-8")
    assert (readme.STALE in text(root)) == marked


def test_the_text_goes_between_the_marks():
    page = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"
    new = readme.replaced(page, "new")
    assert new == f"before\n{readme.BEGIN}\nnew\n{readme.END}\nafter\n"
    assert readme.replaced(new, "new") == new
    with pytest.raises(ValueError, match="benchmarks.readme: end"):
        readme.replaced(readme.BEGIN, "new")


@pytest.mark.quick
def test_readme_says_what_the_newest_run_says():
    page = readme.README.read_text(encoding="utf-8")
    assert page == readme.current(page), "run python -m benchmarks.readme"


def test_every_picture_is_drawn_from_the_run_alone(root):
    (path,) = record.runs(root / "benchmarks/results")["cpu"]
    assert [p.name for p in plots.draw(path)] == ["speedup.png", "roofline.png", "growth.png"]
    assert all(path.with_name(n).read_bytes()[:4] == b"\x89PNG" for n in ("speedup.png", "roofline.png", "growth.png"))
    assert "![Times as fast" in text(root)
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"rows": []}), encoding="utf-8")
    assert plots.draw(path) == []
