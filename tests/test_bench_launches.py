"""One layer launches a bounded number of kernels, Triton's and torch's, the same wherever its tokens go."""

import json
import os
import subprocess
import sys

import pytest

from tests.static.ledger import ROOT

pytest.importorskip("triton")

TORCH = 29  # of them 4 on the CPU: the count of steps of each weight
FUNCTIONS = 2100  # of Python and of what it calls in C; a count has no noise, as a time has


@pytest.mark.slow
def test_a_layer_launches_no_more_than_it_needs():
    """The process is one of its own, since kernels are interpreted or compiled from their import on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.bench_launches", "--rounds=2", "--json"]
    environment |= {"OMP_NUM_THREADS": "1", "MOE_UNLEARN_IMPL": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    counts = found["counts"]
    assert found["fixed"]
    assert counts["forward"] == dict.fromkeys(
        ("_count_kernel", "_scatter_kernel", "_gate_up_kernel", "_linear_kernel", "_sum_kernel"), 1
    )
    once = ("_activation_gradient_kernel", "_weights_gradient_kernel", "_linear_kernel", "_sum_kernel")
    assert counts["backward"] == dict.fromkeys(once, 1) | {"_update_kernel": 2}
    assert not counts["forward, torch"]
    assert sum(counts["backward, torch"].values()) <= TORCH, counts["backward, torch"]
    assert found["calls"] <= FUNCTIONS
