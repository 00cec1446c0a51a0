"""No call of an op crashes; for illegal operands none returns numbers, and all implementations say the same of them."""

import os
import re
import subprocess
import sys

import pytest
import torch

from moe_unlearn import backend
from tests.static.ledger import ROOT
from tests.trust.op_fuzz import OPS, Dice, index_faults

IMPLS = ["ref", "cpu", "triton"]


def outcome(kind: str, first: int, count: int, chosen: list[str]) -> tuple[list[str], int]:
    """Make calls in processes, a new one behind each call that killed one; return what was wrong and how many ran."""
    wrong, made, end = [], 0, first + count
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    while first < end:
        command = [sys.executable, "-m", "tests.trust.op_fuzz", kind, str(first), str(end - first), *chosen]
        child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        numbers = [int(line) for line in child.stdout.splitlines() if re.fullmatch(r"\d+", line)]
        assert numbers, child.stderr
        wrong += [line for line in child.stdout.splitlines() if line.startswith("wrong")]
        if child.returncode:
            wrong.append(f"call {numbers[-1]} ended the process: {child.returncode} {child.stderr[-300:]}")
        made, first = made + len(numbers), numbers[-1] + 1
    return wrong, made


def test_every_op_and_kernel_is_called():
    parts = {"expert_mlp.backward", "token_loss.backward", "token_loss.head", "token_loss.kept", "token_loss.room"}
    tiled = {name for name in backend.registered() if name.startswith(("token_loss.tiled", "token_loss.logit_margin"))}
    assert OPS.keys() | parts | tiled == set(backend.registered())


@pytest.mark.parametrize("op", OPS)
def test_every_operand_that_is_an_index_gets_wrong_ones(op):
    calls = [OPS[op][0](Dice(seed)) for seed in range(30)]
    given = [(name, made) for made in calls for name, value in made.items() if isinstance(value, torch.Tensor)]
    names = {name for name, _ in given if re.search("_rows|offsets|experts|slices", name)}
    assert names == {name for name, made in given if index_faults(name, made)}


@pytest.mark.parametrize("kind,count,chosen", [("legal", 170, IMPLS[:2]), ("illegal", 510, IMPLS)])
def test_a_sample(kind, count, chosen):
    pytest.importorskip("triton")
    wrong, made = outcome(kind, 0, count, chosen)
    assert not wrong and made == count, "\n".join(wrong)


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(6))
@pytest.mark.parametrize("kind", ["legal", "illegal"])
def test_many(kind, part):
    pytest.importorskip("triton")
    wrong, made = outcome(kind, 10**6 + 1000 * part, 1000, IMPLS)
    assert not wrong and made == 1000, "\n".join(wrong)
