"""The record of a GPU run: stamped, stale once a kernel changes, never a pass with a failure or a nameless skip."""

import subprocess
import sys
import warnings

import pytest
import torch

from benchmarks import stamp
from tests import gpu

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.ops.test_gram" name="test_a"/>
<testcase classname="tests.ops.test_gram" name="test_b[x]"><failure message="no"/></testcase>
<testcase classname="tests.ops.test_gram" name="test_c"><error message="no"/></testcase>
<testcase classname="tests.ops.test_gram" name="test_d"><skipped message="only the interpreter gets this wrong"/></testcase>
<testcase classname="tests.ops.test_gram" name="test_e"><skipped message="slow"/></testcase>
</testsuite></testsuites>"""  # noqa: E501
CLEAN = {"errors": 0, "tests_passed": True}


@pytest.fixture
def sources(tmp_path):
    for name in ("triton_kernels/gram.py", "csrc/cuda/route.cuh", "csrc/README.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("first\n", encoding="utf-8")
    return tmp_path


@pytest.mark.quick
@pytest.mark.parametrize("name,goes_stale", [("triton_kernels/gram.py", True), ("csrc/cuda/route.cuh", True),
                                             ("csrc/README.md", False)])  # fmt: skip
def test_a_result_is_stale_once_a_kernel_source_differs(sources, name, goes_stale):
    result = {"stamp": {"kernel_sources": stamp.kernel_sources_hash(sources)}}
    assert not stamp.stale(result, sources)
    (sources / name).write_text("second\n", encoding="utf-8")
    assert stamp.stale(result, sources) == goes_stale


@pytest.mark.quick
def test_a_kernel_that_moves_or_appears_changes_the_hash(sources):
    first = stamp.kernel_sources_hash(sources)
    (sources / "triton_kernels/gram.py").rename(sources / "triton_kernels/route.py")
    moved = stamp.kernel_sources_hash(sources)
    (sources / "triton_kernels/gram.py").write_text("", encoding="utf-8")
    assert len({first, moved, stamp.kernel_sources_hash(sources)}) == 3


@pytest.mark.quick
def test_recorded_results_that_are_stale_are_shown():
    for path, result in stamp.stamped_results().items():
        missing = {"device", "driver", "versions", "commit", "kernel_sources"} - result["stamp"].keys()
        assert not missing, f"{path}: the stamp lacks {missing}"
        if stamp.stale(result):
            warnings.warn(f"{path.relative_to(stamp.ROOT)} is stale: a kernel source changed since", stacklevel=1)


@pytest.mark.quick
def test_only_stamped_results_are_found(tmp_path):
    (tmp_path / "nvidia-h200").mkdir()
    (tmp_path / "nvidia-h200" / "correctness.json").write_text('{"stamp": {"kernel_sources": "0"}}', encoding="utf-8")
    (tmp_path / "seeds.json").write_text("[1, 2]", encoding="utf-8")
    (tmp_path / "summary.json").write_text("{}", encoding="utf-8")
    ((path, result),) = stamp.stamped_results(tmp_path).items()
    assert path.name == "correctness.json" and stamp.stale(result)


@pytest.mark.quick
def test_the_stamp_is_complete():
    made = stamp.stamp()
    assert made["kernel_sources"] == stamp.kernel_sources_hash() and made["versions"]["torch"]
    assert stamp.folder_of("NVIDIA H200") == "nvidia-h200"


@pytest.mark.quick
def test_outcome_and_complaints():
    tests = gpu.outcome(JUNIT)
    assert (tests["passed"], tests["failed"], sum(tests["skipped"].values())) == (1, 2, 2)
    named = {"only the interpreter gets this wrong": 1}
    clean = {"tests": {"passed": 9, "failed": 0, "skipped": named, "failures": []}, "sanitizer": {"memcheck": CLEAN}}
    assert not gpu.complaints(clean)
    failed = gpu.complaints(clean | {"tests": tests})
    assert failed == ["failed: tests.ops.test_gram::test_b[x]", "failed: tests.ops.test_gram::test_c",
                      "1 tests skipped: slow"]  # fmt: skip
    assert gpu.complaints(clean | {"tests": gpu.outcome("<testsuite/>")}) == ["no test ran"]


@pytest.mark.quick
@pytest.mark.parametrize(
    "output,status,complaint",
    [
        ("========= ERROR SUMMARY: 0 errors", 0, None),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, None),
        ("========= ERROR SUMMARY: 0 errors\n========= ERROR SUMMARY: 3 errors", 0, "memcheck: 3 errors, tests passed"),
        ("========= ERROR SUMMARY: 0 errors", 1, "memcheck: 0 errors, tests failed"),
        ("========= Device not supported", 1, "memcheck did not run: compute-sanitizer refuses this device"),
        ("Segmentation fault", 139, "memcheck did not run: no summary: Segmentation fault"),
    ],
)
def test_the_sanitizers_verdict(output, status, complaint):
    passed = {"passed": 9, "failed": 0, "skipped": {}, "failures": []}
    found = gpu.complaints({"tests": passed, "sanitizer": {"memcheck": gpu.verdict(output, status)}})
    assert found == ([complaint] if complaint else [])


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, "-m", "tests.gpu"], cwd=stamp.ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "no CUDA GPU" in done.stderr
