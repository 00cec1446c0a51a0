"""The wheel has what it should, and no torch in its build requirements."""

import os
import subprocess
import sys
import tomllib
import zipfile

import pytest

from tests.support.sources import ROOT, copy_sources


@pytest.mark.quick
def test_build_requirements_leave_torch_out():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert not any("torch" in r for r in project["build-system"]["requires"])
    assert project["project"]["license"] == "Apache-2.0"
    assert project["project"]["scripts"] == {"moe-unlearn": "moe_unlearn.cli:program"}


@pytest.mark.slow
def test_wheel_contents(tmp_path):
    # the backend itself, on a copy: no network, and nothing that an older build left beside the sources
    program = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        check=True,
        cwd=copy_sources(tmp_path),
        env=os.environ | {"MOE_UNLEARN_BUILD": "0"},
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "moe_unlearn/triton_kernels/__init__.py" in names
    assert "moe_unlearn/recipes/combined.yaml" in names and "moe_unlearn/recipes/models/olmoe-1b-7b.yaml" in names
    assert "moe_unlearn/integrations/open_unlearning/trainer/MoENPO.yaml" in names
    assert "moe_unlearn/regress/ledger.json" in names and "moe_unlearn/choices.json" in names
    assert "moe_unlearn/py.typed" in names
    assert "moe_unlearn/ops/route.py" in names
    tops = {n.split("/")[0] for n in names}
    # a top-level triton_kernels would shadow triton-lang's package
    assert {t for t in tops if not t.endswith(".dist-info")} == {"moe_unlearn", "pytest_moe_unlearn"}
