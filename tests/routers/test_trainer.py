"""Invariant routers under the Trainer with all three levers: resumed runs and ended ones have the same bytes."""

import pytest
import torch

from moe_unlearn.data import ForgetRetainDataset
from moe_unlearn.trainer import UnlearnTrainer
from tests.support.models import tiny_olmoe
from tests.support.training import VOCAB, arguments, combined, differing, examples

ROUTER = "router={mode: invariant, rank: 8, stability_every: 1, refresh_below: 1.0, correct: true}"


@pytest.mark.filterwarnings("ignore:.*rows of invariant routers cannot move")
def test_a_run_that_is_resumed_or_has_ended_corrects_routers_to_the_same_bytes(tmp_path):
    dataset = ForgetRetainDataset(examples(8, 1), examples(12, 2), seed=0)

    def trained(resume=None):
        torch.manual_seed(0)
        model = tiny_olmoe(vocab_size=VOCAB).eval()
        trainer = UnlearnTrainer(model, arguments(tmp_path, max_steps=4), combined(ROUTER), dataset)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole, half = trained(), trained(str(tmp_path / "checkpoint-2"))
    ended = trained(True)
    assert differing(whole.model, half.model) == differing(whole.model, ended.model) == []
    logged = [entry["routing_stability"] for entry in whole.state.log_history if "routing_stability" in entry]
    assert len(logged) == 5 and min(logged) < 1, "four steps and the correction"
    last = next(entry for entry in whole.state.log_history if "routing_stability_uncorrected" in entry)
    assert last["routing_stability"] >= last["routing_stability_uncorrected"]
