"""Every op and epilogue under guard pages, fillings, shuffled programs and the tracer, on both code paths."""

import pytest

from moe_unlearn import backend
from moe_unlearn.triton_kernels.common import INTERPRET
from tests.support.checkers.case import findings
from tests.triton_kernels.memory_cases import CASES

pytestmark = pytest.mark.skipif(not INTERPRET.value, reason="the checkers observe the interpreter")
# Where tensor descriptors may be used, tensors keep their alignment; elsewhere they touch the guard page.
ARCHITECTURES = {"80": 1, "90": 16}
# `make quick` takes the smallest cases, on one architecture
QUICK = ("one token", "5x6x37")
# the other ops have the same kernels on every architecture: `make nightly` takes them on both
DESCRIPTORS = ("expert_mlp", "expert_wgrad", "token_loss")
# cases of several tiles are slow: each takes one architecture in turn, and `make nightly` the other
TILES = [name for name in CASES if "tiles" in name]


def marks(name, architecture):
    if architecture == "90" and any(small in name for small in QUICK):
        return pytest.mark.quick
    chosen = ("80", "90")[TILES.index(name) % 2] if name in TILES else "80"
    both = name not in TILES and name.startswith(DESCRIPTORS)
    return () if both or architecture == chosen else pytest.mark.nightly


@pytest.mark.parametrize(
    "name, architecture", [pytest.param(n, a, marks=marks(n, a)) for n in CASES for a in ARCHITECTURES]
)
@pytest.mark.slow
def test_memory_and_order(name, architecture, monkeypatch):
    monkeypatch.setenv("MOE_UNLEARN_TRITON_ARCH", architecture)
    assert findings(CASES[name](), alignment=ARCHITECTURES[architecture]) == []


def test_every_op_and_epilogue_has_a_case():
    assert {name.partition(".")[0] for name in backend.registered()} <= {name.partition("/")[0] for name in CASES}
