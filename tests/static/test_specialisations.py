"""A batch of a new size compiles no kernel anew: sizes of a batch are arguments of a kernel, or few constants."""

import json
import os
import subprocess
import sys

import pytest

from tests.static.ledger import ROOT

pytest.importorskip("triton")

# in a process of its own: kernels are interpreted or compiled from their import on
PROGRAM = """
import json
from unittest import mock
import torch
from moe_unlearn.regress import triton_private
from moe_unlearn.regress.launches import expert_mlp, expert_wgrad, retain_weights, route, token_loss
from moe_unlearn.regress.static_case import LaunchCase

def wgrad(tokens):
    with mock.patch.object(expert_wgrad, "_TOKENS", tokens):
        expert_wgrad.CASES["store"]()

def losses(tokens):
    token_loss._both("nll", (50_304, 256), tokens, trained_head=True, bias=True)
    token_loss._both("kl", (50_304, 256), tokens)
    token_loss._both("uce", (1_000, 256), tokens)
    token_loss._both("nll", (50_304, 256), tokens, keeps=True)
    token_loss._both("kl", (50_304, 256), tokens, keeps=True)

LAUNCHES = {
    "token_loss": losses,
    "route": lambda tokens: route._route(tokens, 128, 8, num_groups=2, tilt=torch.float32),
    "expert_mlp": lambda tokens: expert_mlp._case(tokens=tokens)(),
    "expert_wgrad": wgrad,
    "retain_weights": lambda tokens: retain_weights._both(tokens, 128),
}
# what a first step compiles serves all others: the largest values have a row for each factor, wherever it begins
FROM_ONE = {"expert_mlp, bounded": lambda tokens: expert_mlp._case(tokens=tokens, needs=(True,) * 5)()}
MET = 512, 4096, 16384, 20_001, 40_000, 70_000, 140_000, 300_000
NEW = 1001, 2000, 5000, 7777, 16_385, 17_000, 24_000, 30_000, 33_000, 50_001, 66_000, 100_000, 200_000, 500_003

found = {}
for op, launch in (LAUNCHES | FROM_ONE).items():
    def compiled(tokens):
        case = LaunchCase(op, lambda: launch(tokens))
        return {made.identity: f"{tokens} tokens: {made.name} {made.config}" for made in
                triton_private.launches(case, 90)}
    met = {identity for tokens in (MET[:1] if op in FROM_ONE else MET) for identity in compiled(tokens)}
    new = [text for tokens in NEW for identity, text in compiled(tokens).items() if identity not in met]
    found[op] = {"met": len(met), "new": new}
print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_new_number_of_tokens_compiles_nothing_new():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"MOE_UNLEARN_TRITON_ARCH": "90", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(op["met"] for op in found.values()), found
    assert not any(op["new"] for op in found.values()), "\n".join(line for op in found.values() for line in op["new"])
