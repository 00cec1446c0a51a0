"""What was measured on a GPU is stamped, and stale once a kernel changes."""

import warnings

import pytest

from benchmarks import stamp


@pytest.fixture
def sources(tmp_path):
    for name in ("triton_kernels/gram.py", "csrc/cuda/route.cuh", "csrc/README.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("first\n", encoding="utf-8")
    return tmp_path


@pytest.mark.quick
@pytest.mark.parametrize(
    "name,goes_stale", [("triton_kernels/gram.py", True), ("csrc/cuda/route.cuh", True), ("csrc/README.md", False)]
)
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
