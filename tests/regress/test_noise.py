"""The committed noise is that of busy machines, and is replayed as it was recorded."""

import itertools
import json

import pytest

from moe_unlearn.regress import noise, timing
from moe_unlearn.regress.noise import PATH, Replay, Trace, load


@pytest.mark.quick
def test_the_recording_is_noisy_and_compact():
    traces = load()
    assert {trace.name for trace in traces} == set(noise.workloads())
    assert PATH.stat().st_size < 200_000
    for trace in traces:
        assert len(trace.readings) == noise.ROUNDS
        assert trace.variation >= noise.MINIMUM_VARIATION
        assert trace.tail > 1.2
    assert max(trace.drift for trace in traces) > 0.2
    assert max(trace.autocorrelation for trace in traces) > 0.5


@pytest.mark.quick
def test_a_replay_gives_the_readings_in_order_and_starts_again_at_the_end():
    replay = Replay(Trace("t", (1.0, 2.0, 3.0, 4.0)), start=2)
    call = replay.contender(10.0)
    seen = []
    for _ in range(5):
        before = replay()
        call()
        seen.append(replay() - before)
    assert seen == [30.0, 40.0, 10.0, 20.0, 30.0]


@pytest.mark.quick
def test_rounds_of_a_replay_are_those_of_the_timer():
    """base and head warm up with a reading each; then a round takes three of each, in turns, and the fastest counts."""
    replay = Replay(Trace("t", tuple(float(i) for i in range(1, 15))))
    assert list(itertools.islice(replay.pairs(head=2.0), 2)) == [
        (min(3.0, 6.0, 7.0), 2 * min(4.0, 5.0, 8.0)),
        (min(10.0, 11.0, 14.0), 2 * min(9.0, 12.0, 13.0)),
    ]
    assert timing.REPEATS == 3


def test_recording(tmp_path, capsys, monkeypatch):
    work = {"loop": lambda: sum(range(100))}
    monkeypatch.setattr(noise, "workloads", lambda: work)
    monkeypatch.setattr(noise, "MINIMUM_VARIATION", 0.0)
    content = noise.record(rounds=20, shortest=1e-4)
    assert len(content["traces"]["loop"]["microseconds"]) == 20
    monkeypatch.setattr(noise, "record", lambda names: content)
    out = tmp_path / "noise.json"
    out.write_text(json.dumps(content | {"traces": {"before": {"microseconds": [100] * 10}}}), encoding="utf-8")
    assert noise.main(["--record", "loop", "--out", str(out)]) == 0
    assert [trace.name for trace in load(out)] == ["before", "loop"]
    assert list(tmp_path.iterdir()) == [out]
    assert "99.5th percentile" in capsys.readouterr().out


@pytest.mark.quick
@pytest.mark.slow
def test_what_cannot_be_recorded_or_read_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"expected workloads among .*'gemm'.*; got \['gem'\]"):
        noise.record(["gem"])
    monkeypatch.setattr(noise, "MINIMUM_VARIATION", 1e9)
    with pytest.raises(ValueError, match="python: expected a variation of"):
        noise.record(["python"], rounds=12, shortest=1e-5)
    path = tmp_path / "noise.json"
    for content in ("{", "[]", '{"format": "other"}', '{"format": "moe-unlearn noise 1", "traces": {"a": {}}}'):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError):
            load(path)
