"""masked_update in Triton: the blocks that it divides words into, and which bytes it touches."""

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from moe_unlearn.ops.masked_update import masked_sgd_
from moe_unlearn.testing import in_layout
from moe_unlearn.triton_kernels import configs
from moe_unlearn.triton_kernels.common import INTERPRET
from tests.ops.masked_update.cases import adamw, check, inputs
from tests.support.by_keyword import by_keyword
from tests.support.impls import TRITON

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NaN and infinity are meant


@pytest.mark.quick
@pytest.mark.parametrize("block_words", [1, 4, 128])
@pytest.mark.parametrize("shape", [(3, 5, 70), (2, 130)], ids=str)
@pytest.mark.slow(but=1)
def test_the_size_of_blocks_changes_no_bit(shape, block_words, monkeypatch):
    monkeypatch.setattr(configs, "masked_update", lambda *_: configs.MaskedUpdate(block_words, 4))
    for layout in ("contiguous", "transposed"):
        common, state = inputs("bf16 fp32 state stochastic", shape)
        common["param"] = in_layout(common["param"], layout)
        check(TRITON, adamw, common, state)


@pytest.mark.quick
@pytest.mark.skipif(not INTERPRET.value, reason="records what the interpreter loads and stores")
@pytest.mark.parametrize("master", [False, True])
def test_only_what_is_needed_is_loaded_and_stored(master, monkeypatch):
    """Nothing behind a zero word; what only supplies masked bits, not behind a word of ones either; each word once."""
    common, (buffer, _) = inputs("bf16 master" if master else "bf16 fp32 state", (1, 256))
    words = common["mask"] = torch.tensor([[0, 5, 0, -1, 0, 0, -(2**31), 0]], dtype=torch.int32)
    monkeypatch.setattr(configs, "masked_update", lambda *_: configs.MaskedUpdate(2, 4))
    loaded, stored = [], []

    def record(name, position, into):
        original = getattr(InterpreterBuilder, name)

        def recording(self, pointers, *rest):
            into.extend(pointers.data[np.broadcast_to(rest[position].data, pointers.data.shape)].tolist())
            return original(self, pointers, *rest)

        monkeypatch.setattr(InterpreterBuilder, name, recording)

    def elements(addresses, tensor):
        begin, width = tensor.data_ptr(), tensor.element_size()
        return [(a - begin) // width for a in addresses if begin <= a < begin + tensor.numel() * width]

    record("create_masked_load", 0, loaded)
    record("create_masked_store", 1, stored)
    by_keyword(masked_sgd_)(momentum_buffer=buffer, momentum=0.9, impl="triton", **common | {"step": 1})
    live = [i for i in range(256) if words[0, i // 32]]
    partial = [i for i in live if words[0, i // 32] != -1]
    assert elements(loaded, words) == list(range(8))
    assert elements(loaded, common["grad"]) == live and not elements(stored, common["grad"])
    assert elements(loaded, buffer) == partial and elements(stored, buffer) == live
    assert (
        elements(loaded, common["param"]) == (partial if master else live) and elements(stored, common["param"]) == live
    )
    if master:
        assert elements(loaded, common["master"]) == elements(stored, common["master"]) == live
