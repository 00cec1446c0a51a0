"""Every op and epilogue under guard pages, fillings, shuffled programs and the tracer, on both code paths."""

import collections

import pytest

from moe_unlearn import backend
from moe_unlearn.triton_kernels.common import INTERPRET
from tests.support.checkers.case import findings
from tests.triton_kernels.memory_cases import CASES, DESCRIPTORS

pytestmark = pytest.mark.skipif(not INTERPRET.value, reason="the checkers observe the interpreter")
# Where tensor descriptors may be used, tensors keep their alignment; elsewhere they touch the guard page.
ARCHITECTURES = {"80": 1, "90": 16}
# `make quick` takes the smallest cases, on one architecture
QUICK = ("one token", "5x6x37")
# Ops whose kernels differ by architecture take each case on one in turn, and so do all slow cases, those of several
# tiles; of these an epilogue takes one of two, and a loss one dtype. `make nightly` has the rest, and the other ops on
# the second architecture.
REPEATED = {f"expert_wgrad/{epilogue} tiles" for epilogue in ("accumulate", "adamw", "inner")}
REPEATED |= {f"expert_wgrad/{epilogue} odd tiles" for epilogue in ("store", "sgd")}
REPEATED |= {f"token_loss/{case}" for case in ("nll tiles float32", "uce tiles bfloat16", "kl tiles float32")}
TURNS = [name for name in CASES if (name.startswith(DESCRIPTORS) or "tiles" in name) and name not in REPEATED]


def marks(name, architecture):
    if architecture == "90" and any(small in name for small in QUICK):
        return pytest.mark.quick
    chosen = ("80", "90")[TURNS.index(name) % 2] if name in TURNS else "80"
    return () if architecture == chosen and name not in REPEATED else pytest.mark.nightly


@pytest.mark.parametrize(
    "name, architecture", [pytest.param(n, a, marks=marks(n, a)) for n in CASES for a in ARCHITECTURES]
)
@pytest.mark.slow
def test_memory_and_order(name, architecture, monkeypatch):
    monkeypatch.setenv("MOE_UNLEARN_TRITON_ARCH", architecture)
    assert findings(CASES[name](), alignment=ARCHITECTURES[architecture]) == []


def test_every_op_and_epilogue_has_a_case():
    assert {name.partition(".")[0] for name in backend.registered()} <= {name.partition("/")[0] for name in CASES}


def test_every_epilogue_and_loss_is_checked_on_both_architectures():
    kinds = collections.Counter(name.split()[0] for name in CASES if name.startswith(("expert_wgrad", "token_loss")))
    taken = {(n.split()[0], a) for n in CASES for a in ARCHITECTURES if marks(n, a) != pytest.mark.nightly}
    assert [(k, a) for k, count in kinds.items() for a in ARCHITECTURES if count > 1 and (k, a) not in taken] == []
    assert REPEATED < CASES.keys()
