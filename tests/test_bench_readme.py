"""The figures of README and RESULTS.md and the pictures are what the recorded runs say; stale figures are marked."""

import json

import pytest

from benchmarks import headline, plots, readme, record, stamp


def row(op, name, value, target, **more):
    verdict = {
        "what": "times as fast as rival",
        "value": value,
        "target": target,
        "hit": value >= target,
        "low": value - 0.1,
        "high": value + 0.1,
    }
    return {
        "op": op,
        "name": name,
        "missing": {"peer": "its kernels need a GPU"},
        "verdicts": [verdict],
        "milliseconds": {"ours": 1.0, "rival": value},
        **more,
    }


@pytest.fixture
def root(tmp_path):
    for name in ("triton_kernels/gram.py", "csrc/cpu/gram.cpp", "csrc/cuda/gram.cuh"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("first\n", encoding="utf-8")
    layer = [
        row(
            "expert_layer",
            f"{t} tokens, {s}",
            2.0,
            1.0,
            geometry="g",
            tokens=t,
            share=s,
            dtype="bfloat16",
            flops=1e9 * t,
            bytes=1e8,
            extra_mib={"ours": 1.0, "rival": 3.0},
        )
        for t, s in ((256, 0.2), (512, 0.2), (1024, 0.2), (1024, 1.0))
    ]
    run = {
        "stamp": {"device": "cpu", "commit": "0123456789ab"},
        "fingerprint": {"device": "cpu", "cpu": "A CPU", "native": "avx2", "threads": "1", "torch": "2.13"},
        "kernels": stamp.kernel_sources_hash(tmp_path, device="cpu"),
        "time": "processor",
        "ceilings": {"flops": {"bfloat16": 1e11}, "bytes": 1e10},
        "state": record.COMPLETE,
        "started": 1,
        "rows": [*layer, row("route", "T 64", 0.9, 1.0), {"op": "gram", "name": "m", "skipped": "no time"}],
    }
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


@pytest.mark.parametrize(
    "name,marked", [("csrc/cpu/gram.cpp", True), ("csrc/cuda/gram.cuh", False), ("triton_kernels/gram.py", False)]
)
def test_a_kernel_of_that_device_that_changed_marks_the_table(root, name, marked):
    (root / name).write_text("second\n", encoding="utf-8")
    assert (readme.STALE in text(root)) == marked


def test_each_kind_of_processor_has_its_newest_run(root):
    """The one that was not held back and is the newest comes first, and alone has the picture and the headline."""
    (path,) = record.runs(root / "benchmarks/results")["cpu"]
    run = json.loads(path.read_text(encoding="utf-8"))
    path.with_name("speedup.png").write_bytes(b"")
    for date, cpu, held in (("03", "B", ""), ("04", "B", ""), ("05", "B", "AVX512_CORE_BF16"), ("01", "A CPU", "")):
        other = run | {"fingerprint": run["fingerprint"] | {"cpu": cpu}, "onednn_held_to": held}
        path.with_name(f"2026-01-{date}-012345678.json").write_text(json.dumps(other), encoding="utf-8")
    places = [text(root).find(f"cpu/2026-01-{date}-") for date in ("04", "02", "05")]
    assert 0 < places[0] < places[1] < places[2] and text(root).count("commit 012345678") == 3
    assert "torch's products held to AVX512_CORE_BF16" in text(root)[places[1] :]
    assert text(root).count("speedup.png") == 1 and 0 < text(root).find("speedup.png") < places[1]
    assert "B (avx2)" not in readme.headlines(root / "benchmarks/results", root)
    assert record.latest("cpu", root / "benchmarks/results")[0].name.startswith("2026-01-04")


def test_the_text_goes_between_the_marks():
    begin, end = readme.marks("suite")
    page = f"before\n{begin}\nold\n{end}\nafter\n"
    new = readme.replaced(page, "new", "suite")
    assert new == f"before\n{begin}\nnew\n{end}\nafter\n"
    assert readme.replaced(new, "new", "suite") == new
    with pytest.raises(ValueError, match="benchmarks.suite: end"):
        readme.replaced(begin, "new", "suite")


@pytest.mark.quick
@pytest.mark.parametrize("page", readme.SECTIONS, ids=lambda path: path.name)
def test_a_page_says_what_the_newest_run_says(page):
    assert page.read_text(encoding="utf-8") == readme.current(page), "run python -m benchmarks.readme"


def verdict(what, value, target, hit):
    return {"what": what, "value": value, "target": target, "hit": hit}


@pytest.mark.quick
def test_the_headline_has_the_best_result_and_the_largest_miss_of_a_step(root):
    (path,) = record.runs(root / "benchmarks/results")["cpu"]
    run = json.loads(path.read_text(encoding="utf-8"))
    asked = [
        ("ours: speed-up over dense", 3.0, 2.0, True),
        ("ours: speed-up over dense", 1.9, 2.0, False),
        ("ours: share of the ceiling", 0.4, 0.8, False),
        ("ours: extra memory of x", 0.1, 0.3, True),
        ("ours: time of y", 9.0, None, None),
    ]
    verdicts = [verdict(*one) for one in asked]
    run["rows"] += [{"op": "step", "name": "wide", "verdicts": verdicts}]
    path.write_text(json.dumps(run), encoding="utf-8")
    page = readme.headlines(root / "benchmarks/results", root).splitlines()
    assert page[2:] == [
        "| speed: one step on A CPU | wide: 3.00 times as fast (against: dense; asked: 2) "
        "| wide: 0.40 share of the speed (against: ceiling; asked: 0.8) |"
    ]
    (root / "csrc/cpu/gram.cpp").write_text("second\n", encoding="utf-8")
    assert readme.STALE in readme.headlines(root / "benchmarks/results", root)


@pytest.mark.quick
def test_the_headline_of_quality_is_what_the_experiment_s_report_calls_reached(root):
    results = root / "benchmarks/results"
    assert headline.table(results) == "No run of the embedded experiment is recorded yet."
    for name, forgotten in (("cpu-demo", 0.15), ("cpu-demo-b", 0.3)):
        (results / name).mkdir()
        runs = {"retrain": (0.1, 1.0), "target": (1.0, 1.0), "combined": (forgotten, 0.96)}
        summary = {
            run: {"verbmem_f": f, "verbmem_r": r, "knowmem_f": 0, "nll_f": 1, "nll_r": 2}
            for run, (f, r) in runs.items()
        }
        (results / name / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        seeds = {"corpus": f"builtin:{name}", "results": {"5": summary, "6": summary}}
        (results / name / "seeds.json").write_text(json.dumps(seeds), encoding="utf-8")
    _, best, miss = readme.headlines(results, root).splitlines()[2].strip("| ").split(" | ")
    assert best.startswith("`builtin:cpu-demo`, seeds 5, 6: forget VerbMem 0.150") and "96.0% of retain" in best
    assert miss.startswith("`builtin:cpu-demo-b`") and "0.300" in miss
    assert "| three levers | 0.150 | 0.960 | 0.000 | 1.00 | 2.00 |" in headline.table(results)


def test_every_picture_is_drawn_from_the_run_alone(root):
    (path,) = record.runs(root / "benchmarks/results")["cpu"]
    assert [p.name for p in plots.draw(path)] == ["speedup.png", "roofline.png", "growth.png"]
    assert all(path.with_name(n).read_bytes()[:4] == b"\x89PNG" for n in ("speedup.png", "roofline.png", "growth.png"))
    assert "![Times as fast" in text(root)
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"rows": []}), encoding="utf-8")
    assert plots.draw(path) == []
