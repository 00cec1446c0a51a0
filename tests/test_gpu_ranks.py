"""The GPU run of several ranks, as far as a CPU goes: two ranks over gloo, what is refused, how overlap is measured."""

import pytest

from benchmarks.journal import Journal, of_kind, read
from moe_unlearn import sharding
from tests import gpu_ranks


@pytest.mark.quick
def test_overlap_is_the_part_of_collectives_beside_which_a_kernel_runs():
    collective = [(0.0, 10.0, True), (8.0, 12.0, True)]
    assert gpu_ranks.overlap([*collective, (2.0, 4.0, False), (3.0, 5.0, False), (11.0, 20.0, False)]) == 4 / 12
    assert gpu_ranks.overlap(collective) == gpu_ranks.overlap([(0.0, 1.0, False)]) == gpu_ranks.overlap([]) == 0
    assert gpu_ranks.overlap([(0.0, 1.0, True), (1.0, 2.0, False)]) == 0


@pytest.mark.quick
@pytest.mark.parametrize(
    ("gpus", "version", "said"),
    [
        (0, "2.13.0", "ranks need two GPUs; this machine has 0"),
        (1, "2.13.0", "ranks need two GPUs; this machine has 1"),
        (8, "2.12.1", "sharded weights need torch >= 2.13"),
    ],
)
def test_what_a_machine_lacks_is_said_and_nothing_is_run(gpus, version, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_ranks.torch.cuda, "device_count", lambda: gpus)
    actual = sharding.engine.importlib.metadata.version
    monkeypatch.setattr(
        sharding.engine.importlib.metadata, "version", lambda name: version if name == "torch" else actual(name)
    )
    assert gpu_ranks.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"not run: {said}") and not [*tmp_path.iterdir()]


@pytest.mark.quick
def test_ranks_that_end_otherwise_than_they_should_fail(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_ranks, "conduct", lambda check, *_: "ranks ended with [1, 0]" if check == "order" else "")
    assert gpu_ranks.main(["--out", str(tmp_path), "--device", "cpu"]) == 1
    assert "failed order ranks ended with [1, 0]" in capsys.readouterr().out
    # what an earlier run has written is not of this one
    Journal(tmp_path / gpu_ranks.JOURNAL).write("test", name="old", outcome="failed", why="")
    assert gpu_ranks.main(["--out", str(tmp_path), "--device", "cpu", "--only", "memory"]) == 0


@pytest.mark.nightly  # the steps and the lost rank are those of tests/sharding
def test_two_ranks_rehearse_it(tmp_path):
    assert gpu_ranks.main(["--out", str(tmp_path), "--device", "cpu"]) == 0
    names = [line["name"] for line in of_kind(read(tmp_path / gpu_ranks.JOURNAL), "test")]
    assert {"order", "memory", "lost"} < set(names)
    assert sum(name.startswith("order: ") for name in names) == 2 * len(gpu_ranks.COMPARED)
    assert sum(name.startswith("memory: ") for name in names) == 4
