"""A wheel and an sdist are built and installed into fresh environments, of every Python that is allowed."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import moe_unlearn
from tests.support.sources import copy_sources

BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
INSTALLED = """
import sys
import moe_unlearn
assert moe_unlearn.__file__.startswith(sys.argv[1]), moe_unlearn.__file__
print(moe_unlearn.__version__)
"""
USED = """
sys.path.append(sys.argv[2])
import torch
from moe_unlearn import native
from moe_unlearn.ops import route
print(*native.report(), sep="\\n")
print(route(torch.tensor([[1, 0]]), 2, impl="cpu").expert_offsets.tolist())
"""


def built(kind, folder, out, **environment):
    """Build a wheel or an sdist with setuptools' own backend: no network, no build isolation."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, f"build_{kind}", str(out)],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (made,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made


def interpreter(version):
    """Return an interpreter of a version that works: pyenv's own command on the PATH may lead nowhere."""
    for path in (shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")):
        if path is not None and not subprocess.run([path, "-c", ""], capture_output=True).returncode:
            return path
    return None


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel with the native library, built from an sdist that was made where nothing could be built."""
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler")
    root = tmp_path_factory.mktemp("wheels")
    sdist = built("sdist", copy_sources(root), root, MOE_UNLEARN_BUILD="0")
    shutil.unpack_archive(sdist, root / "unpacked", filter="data")
    (unpacked,) = (root / "unpacked").iterdir()
    return built("wheel", unpacked, root, MOE_UNLEARN_BUILD="cpu")


@pytest.mark.nightly
@pytest.mark.parametrize("version", ["3.11", "3.12"])
def test_the_wheel_of_an_sdist_installs_into_a_fresh_environment(version, wheel, tmp_path):
    """The sdist has all that the kernels take; one wheel is for every Python, by its stable ABI.

    A fresh environment has no torch: that of the tests lends its own to the one of its version, which runs an op.
    """
    assert "-cp311-abi3-" in wheel.name and "moe_unlearn/_C_cpu.abi3.so" in zipfile.ZipFile(wheel).namelist()
    own = sys.version.startswith(f"{version}.")
    found = sys.executable if own else interpreter(version)
    if found is None:
        pytest.skip(f"there is no python{version}, on the PATH or of pyenv")
    subprocess.run([found, "-m", "venv", str(tmp_path / "fresh")], check=True)
    python = tmp_path / "fresh" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    program = [INSTALLED, USED] if own else [INSTALLED]
    lent = next(path for path in sys.path if path.endswith("site-packages")) if own else ""
    command = [python, "-c", "\n".join(program), str(tmp_path), lent]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = f"{moe_unlearn.__version__}\n" + ("cpu: built, " if own else "")
    assert done.stdout.startswith(expected) and ("[0, 1, 2]" in done.stdout) is own
    assert (tmp_path / "fresh" / "bin" / "moe-unlearn").exists()


@pytest.mark.slow
def test_a_wheel_that_was_built_without_a_compiler_says_why(tmp_path):
    """`moe-unlearn env` of what it is installed as tells it; pip keeps what a build prints to itself."""
    (tmp_path / "out").mkdir()
    wheel = built("wheel", copy_sources(tmp_path), tmp_path / "out", MOE_UNLEARN_BUILD="", CXX="no-such-compiler")
    assert wheel.name.endswith("-none-any.whl")
    told = zipfile.ZipFile(wheel).read("moe_unlearn/_C_build.txt").decode()
    assert told.startswith("cpu: not built: no C++ compiler\n") and "cuda: not built: " in told
