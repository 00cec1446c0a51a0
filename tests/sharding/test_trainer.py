"""UnlearnTrainer on weights that an engine shares out over two ranks trains as one process does."""

import pytest
import torch
from safetensors.torch import load_file

from tests.support import trainer_child
from tests.support.forked_ranks import found_on
from tests.support.trainer_child import BITWISE, CASES, CLOSE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder where both have left what they found, and that."""
    folder = tmp_path_factory.mktemp("trainer")
    return folder, *found_on(2, folder, lambda rank: trainer_child.found_by(rank, folder))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Weights and losses of one process that accumulates the ranks' micro-batches, by case."""
    made, folder = {}, tmp_path_factory.mktemp("alone")

    def of(case, dtype=torch.float32, accumulate=2):
        if (case, dtype, accumulate) not in made:
            model = trainer_child.model().to(dtype)
            found = trainer_child.trained(model, case, folder, gradient_accumulation_steps=accumulate)
            made[case, dtype, accumulate] = found
        return made[case, dtype, accumulate]

    return of


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", BITWISE)
def test_two_ranks_train_as_one_process(engine, case, ranks, alone):
    folder, *found = ranks
    ours, (expected, losses) = load_file(folder / f"{engine} {case}.safetensors"), alone(case)
    mine, theirs = (each[f"{engine} {case}"] for each in found)
    assert mine == theirs
    assert mine["losses"] == pytest.approx(losses["losses"], rel=1e-6)
    assert mine["evaluated"] == pytest.approx(losses["evaluated"], rel=1e-5)
    assert [name for name in expected if not torch.equal(ours[name], expected[name])] == []


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", CLOSE)
def test_in_another_order_sums_differ_by_rounding_alone(engine, case, ranks, alone):
    folder, *found = ranks
    expected, losses = alone(case, torch.float64, 4 if engine == "micro-batches" else 2)
    ours = load_file(folder / f"{engine} {case}.safetensors")
    assert found[0][f"{engine} {case}"]["losses"] == pytest.approx(losses["losses"], rel=1e-9)
    for name, start in trainer_child.model().double().named_parameters():
        change = (expected[name] - start.detach()).abs().max()
        assert (ours[name] - expected[name]).abs().max() <= 1e-9 * change, name


@pytest.mark.parametrize(
    "name, words",
    [
        ("tensors", "is cut along another dimension than 0"),
        ("deepspeed", "DeepSpeed shares weights out in a way that is not supported"),
        ("FSDP1", "FSDP1 flattens weights, which is not supported"),
        ("activations", "`activation_checkpointing` in `fsdp_config` renames parameters"),
        ("left out", "FSDP was asked for, but accelerate ignores that where it sees MULTI_CPU"),
    ],
)
def test_an_engine_that_is_not_supported_is_named(name, words, ranks):
    for found in ranks[1:]:
        assert words in found["refused"][name]
