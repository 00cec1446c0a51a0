"""Two gloo processes share the work and both get what one process gets."""

import json

import pytest
import torch

from moe_unlearn.metrics.workers import share
from moe_unlearn.ranks import gather, gathered, is_first
from tests.support.forked_ranks import found_on
from tests.support.workers_child import evaluations, found_by


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    first, second = found_on(2, tmp_path, lambda rank: found_by(rank, tmp_path))
    alone = evaluations(None)
    for key, value in alone.items():
        assert first[key] == second[key]
        if key == "logprobs":  # rows in batches of other sizes are rounded otherwise
            for row, expected in zip(first[key], value, strict=True):
                torch.testing.assert_close(torch.tensor(row), torch.tensor(expected))
        else:
            assert first[key] == value
    assert first["shared"] == second["shared"] == [0.1, 0.2, 3 * 0.1]
    assert first["mine"] == [1, 3] and second["mine"] == [2]
    assert first["errors"][0] == "RankError: rank 1 stopped: KeyError: 'broken'"
    assert second["errors"][0] == "KeyError: 'broken'"
    assert first["errors"][1] == "ValueError: expected the same items on every rank; the ranks have [1, 2]"
    assert first["errors"][2:] == ["OSError: no space", "SafetensorError: no tensor", "OSError: no space"]
    assert second["errors"][2:] == [
        "RankError: rank 0 stopped: OSError: no space",
        "RankError: rank 0 stopped: SafetensorError: no tensor",
        "CheckpointError: rank 0 stopped: OSError: no space",
    ]
    assert first["told"] == second["told"] == ["one", [1, 2]]
    assert first["sharded"] == second["sharded"] and len(first["sharded"]) == 3
    whole = "needs whole weights on every rank; got a model whose weights ranks share out"
    assert first["refused"] == second["refused"] == [f"the relearning attack {whole}", f"mia_gradnorm {whole}"]
    assert json.loads((tmp_path / "run" / "MUSE_SUMMARY.json").read_text(encoding="utf-8")) == first["summary"]
    results = json.loads((tmp_path / "run" / "MUSE_EVAL.json").read_text(encoding="utf-8"))
    assert len(list((tmp_path / "cache").iterdir())) == len(results)  # one file a result, of one rank


@pytest.mark.quick
def test_one_process_needs_no_group():
    assert share(torch.nn.Linear(1, 1), (1, 2), lambda items: [2 * i for i in items]) == [2, 4]
    with pytest.raises(ValueError, match="batch_size of at least 1; got 0"):
        share(torch.nn.Linear(1, 1), (1, 2), list, batch_size=0)
    words, given = ["ccc", "a", "bb", "dd"], []
    assert share(torch.nn.Linear(1, 1), words, lambda own: given.append(own) or own, batch_size=2, key=len) == words
    assert given == [["a", "bb"], ["dd", "ccc"]]
    assert gather({"a": 1}) == [{"a": 1}] and is_first()
    assert gathered(lambda: 1, str) == (1, ["1"])
