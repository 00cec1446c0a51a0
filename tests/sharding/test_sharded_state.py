"""What each of two ranks keeps under FSDP2: random bits of rounding, its part of masks and states, numerics."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.support.sharded_state_child import NARROW, alike, narrow
from tests.support.two_ranks import run_two

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder where both have left what they found, and that."""
    folder = tmp_path_factory.mktemp("state")
    run_two("tests.support.sharded_state_child", folder)
    return folder, *(json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2))


@pytest.mark.parametrize("name", NARROW)
def test_bfloat16_is_rounded_with_the_random_bits_of_one_process(name, ranks):
    folder, *_ = ranks
    ours, expected = load_file(folder / f"{name}.safetensors"), alike(name, 2, shared=False)
    assert any(not torch.equal(value, expected[key]) for key, value in narrow(shared=False).named_parameters())
    assert [key for key in expected if not torch.equal(ours[key], expected[key])] == []
