"""Triton is optional: the package imports without it, and asking for it by name is an error that says so."""

import os
import re
import subprocess
import sys

import pytest

from tests.static.ledger import ROOT

# None in sys.modules is how Python itself records that an import is impossible
PROGRAM = """
import sys
sys.modules["triton"] = None
import torch, moe_unlearn
from moe_unlearn.ops import route
index = torch.tensor([[0, 1], [1, 0]])
print(route(index, 2).expert_offsets.tolist())
try:
    route(index, 2, impl="triton")
except RuntimeError as error:
    print(error)
from moe_unlearn.cli import main
raise SystemExit(main(["env"]))
"""


@pytest.mark.slow
def test_the_package_works_and_a_forced_triton_is_refused():
    # with the interpreter asked for, only the missing package can be the reason
    environment = os.environ | {"TRITON_INTERPRET": "1", "MOE_UNLEARN_IMPL": ""}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    works, refused, *told = done.stdout.splitlines()
    assert works == "[0, 2, 4]"
    assert refused.startswith("'route' has no implementation triton for device 'cpu'; available: ")
    assert any(re.search(r"\broute\b.*\bref\b", line) for line in told), told
