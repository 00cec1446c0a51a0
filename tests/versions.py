"""Runs tests against the oldest and the newest transformers, torch and PEFT that the package allows.

    python -m tests.versions                    # both, each in an environment of its own: .venv/versions/oldest ...
    python -m tests.versions oldest -k adapter  # one of them; what follows is for pytest

The oldest versions are the lower bounds of pyproject.toml. torch comes from pytorch.org's index of builds for
processors; where that cannot be reached the environment gets the torch of this one, and a line says so.
"""

import argparse
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENDS = ("oldest", "newest")
LIBRARIES = ("transformers", "torch", "peft")
CPU = "https://download.pytorch.org/whl/cpu"
# what reaches into these libraries: experts, steps, the Trainer, adapters, generation, saved models, the command line
TESTS = (
    *("tests/test_experts.py", "tests/test_step.py", "tests/test_adapters.py", "tests/test_saved_model.py"),
    *("tests/trainer/test_arguments.py", "tests/metrics/test_scoring.py", "tests/metrics/test_padding.py"),
    *("tests/runs/test_checkpointing.py", "tests/test_run.py"),
)
LISTED = "import sys; from importlib.metadata import version; print([f'{n} {version(n)}' for n in sys.argv[1:]])"
MARKS = "quick and not slow and not nightly"


def wanted(end: str) -> dict[str, str]:
    """Return what pip is asked for at one end, by library."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    every = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    asked = {}
    for library in LIBRARIES:
        bounds = next(own for own in every if re.match(rf"{library}\b", own))
        least = re.search(r">=([\d.]+)", bounds)
        assert least is not None, f"{bounds} has no lower bound"
        asked[library] = f"{library}=={least[1]}.*" if end == "oldest" else bounds
    return asked


def environment(folder: Path, asked: dict[str, str]) -> Path:
    """Make an environment that has these versions, and whatever else this one has; return its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    python = folder / "bin" / "python"
    lent = Path(sysconfig.get_paths(vars={"base": str(folder)})["purelib"]) / "lent.pth"
    # what is not installed anew is found there, behind its own packages; with its .pth files, by which this package is
    lent.write_text(f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n", encoding="utf-8")
    install = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, asked["transformers"], "--ignore-installed", "--no-deps"], check=True)
    # what this version of transformers asks for beside it
    subprocess.run([*install, asked["transformers"]], check=True)
    subprocess.run([*install, asked["peft"], "--ignore-installed", "--no-deps"], check=True)
    got = _succeeds(*install, asked["torch"], "--ignore-installed", "--no-deps", "--index-url", CPU)
    # pip may know of another index too, whose torch is for GPUs and needs libraries that were not asked for
    if got and not _succeeds(str(python), "-c", "import torch"):
        subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "torch"], check=True)
        got = False
    if not got:
        print(f"{asked['torch']} cannot be had from {CPU}: the torch of this environment stays", file=sys.stderr)
    return python


def _succeeds(*command: str) -> bool:
    return subprocess.run(command).returncode == 0


def main() -> int:
    """Make the environments and run the tests in each; return 1 if some fail."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("end", nargs="?", choices=ENDS, help="one of both")
    options, more = parser.parse_known_args()
    failed = []
    for end in ENDS if options.end is None else (options.end,):
        python = environment(ROOT / ".venv" / "versions" / end, wanted(end))
        print(f"{end}: ", end="", flush=True)
        subprocess.run([str(python), "-c", LISTED, *LIBRARIES], check=True)
        command = [str(python), "-m", "pytest", "-m", MARKS, *(more or TESTS)]
        if subprocess.run(command, cwd=ROOT).returncode:
            failed.append(end)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
