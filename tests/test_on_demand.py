"""The package's names are loaded when they are asked for, and its experts are there whichever package came first."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import moe_unlearn

pytestmark = pytest.mark.quick


def python(*lines: str) -> str:
    """What a new interpreter prints."""
    return subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True).stdout


def test_every_public_name_is_what_its_home_has():
    assert {*moe_unlearn.__all__} == {*moe_unlearn.homes} <= {*dir(moe_unlearn)}
    for name, home in moe_unlearn.homes.items():
        module = importlib.import_module(f"moe_unlearn.{home}")
        assert getattr(moe_unlearn, name) is (module if name == home else getattr(module, name))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = moe_unlearn.nothing


def test_type_checkers_see_the_names_that_are_there():
    tree = ast.parse(Path(moe_unlearn.__file__).read_text(encoding="utf-8"))
    [checked] = [node.body for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in checked for alias in node.names}
    for name, home in moe_unlearn.homes.items():
        assert name in seen and f"moe_unlearn.{home}".startswith(seen[name]), name
    assert seen.keys() == {*moe_unlearn.homes}


def test_importing_the_package_takes_no_torch_and_its_names_do():
    said = python(
        "import sys, moe_unlearn",
        "print('torch' in sys.modules, 'transformers' in sys.modules)",
        "from moe_unlearn import *",
        "import moe_unlearn.audit.run, pickle, copy",
        "print(callable(moe_unlearn.audit), audit is moe_unlearn.audit, MaskedAdamW.__module__)",
        "print(pickle.loads(pickle.dumps(Recipe.load('npo'))) == moe_unlearn.Recipe.load('npo'))",
    )
    assert said.splitlines() == ["False False", "True True moe_unlearn.optim", "True"]


@pytest.mark.parametrize("first", ["moe_unlearn", "transformers.integrations.finegrained_fp8"])
def test_the_experts_are_registered_whichever_package_is_imported_first(first):
    said = python(
        f"import {first}, moe_unlearn, sys",
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as whole",
        "from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS as quantised",
        "late = whole['moe_unlearn']",
        "print('moe_unlearn.experts' in sys.modules, 'moe_unlearn' in quantised.keys())",
        "try: late(None)",
        "except TypeError as error: print(error)",
        "print(whole['moe_unlearn'] is sys.modules['moe_unlearn.experts'].experts_forward)",
    )
    loaded, missing, real = said.splitlines()
    assert loaded == "False True" and "experts_forward() missing 3 required" in missing and real == "True"
