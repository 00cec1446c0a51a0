"""The Dockerfiles: pinned bases, a user of their own, nothing secret, copies of what is there; built by Docker."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "benchmarks" / "docker").glob("*.Dockerfile"))


def faults(text):
    """Return what is wrong with a Dockerfile, one line each; commands may go on over lines."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    commands = [tuple(c.split(None, 1)) for c in re.sub(r"\s*\\\n\s*", " ", "\n".join(lines)).splitlines()]
    found = []
    for name, rest in commands:
        if name == "FROM" and not re.fullmatch(r"[\w./-]+:\d[\w.-]+", rest):
            found.append(f"expected a base of a tag with its version; got {rest}")
        if name in ("COPY", "ADD"):
            found += [f"{part} is not there" for part in rest.split()[:-1] if not (ROOT / part).exists()]
        if name == "ADD":
            found.append("expected COPY; got ADD")
        if re.search(r"token|password|secret|api_?key", rest, re.IGNORECASE):
            found.append(f"expected nothing secret; got {rest}")
        if "apt-get install" in rest and not (
            "--no-install-recommends" in rest and "rm -rf /var/lib/apt/lists" in rest
        ):
            found.append("expected apt-get without recommendations and lists")
        found += ["expected pip without a cache"] * (rest.count("pip install") - rest.count("install --no-cache-dir"))
    names = [name for name, _ in commands]
    users = [i for i, name in enumerate(names) if name == "USER"]
    if not users or commands[users[-1]][1] in ("root", "0") or "RUN" in names[users[-1] :]:
        found.append("expected a user other than root behind the last RUN")
    return found


@pytest.mark.quick
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_dockerfile_is_sound(file):
    assert faults(file.read_text(encoding="utf-8")) == []


@pytest.mark.quick
@pytest.mark.parametrize(
    "old,new,fault",
    [
        ("python:3.12-slim-bookworm", "python:latest", "expected a base of a tag"),
        ("USER user\n", "", "expected a user other than root"),
        ("USER user", "USER root", "expected a user other than root"),
        ("COPY csrc csrc", "COPY kernels csrc", "kernels is not there"),
        ("CMD [", "ENV HF_TOKEN=abc\nCMD [", "expected nothing secret"),
        ("    && rm -rf /var/lib/apt/lists/*", "    && true", "expected apt-get without"),
        ('--no-cache-dir "setuptools', '"setuptools', "expected pip without a cache"),
    ],
)
def test_a_fault_is_found(old, new, fault):
    text = (ROOT / "benchmarks" / "docker" / "cpu.Dockerfile").read_text(encoding="utf-8")
    assert old in text and any(line.startswith(fault) for line in faults(text.replace(old, new)))


@pytest.mark.nightly
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_an_image_is_built_and_says_what_it_has(file):
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode:
        pytest.skip("there is no Docker that runs")
    tag = f"moe-unlearn-test:{file.stem}"
    subprocess.run(["docker", "build", "--file", file, "--tag", tag, ROOT], check=True)
    said = subprocess.run(["docker", "run", "--rm", tag], check=True, capture_output=True, text=True).stdout
    assert f"native library {file.stem}: built" in said
