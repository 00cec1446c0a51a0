"""`make gpu`: the kernels' tests and compute-sanitizer on this machine's GPU, and a stamped record of the outcome.

Runs tests/triton_kernels and tests/ops on the device, then memcheck, racecheck and initcheck over the quick tests
of the kernels, and writes benchmarks/results/<device>/correctness.json. Exit status: 0 all passed, 1 something
failed or was skipped without a reason that holds on a GPU, 2 no GPU.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from benchmarks import stamp

FOLDERS = ("tests/triton_kernels", "tests/ops", "tests/native/test_cuda_device.py")
SANITIZER_FOLDER = "tests/triton_kernels"
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck")
SANITIZER_SECONDS = 1800
# a test that is about the interpreter, or about machines of another kind, has nothing to do on a GPU
SKIPS_ALLOWED = re.compile(r"interpreter|without a GPU|needs Hopper", re.IGNORECASE)
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")


def pytest_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]


def run_tests() -> dict:
    """{"passed", "failed", "skipped": {reason: count}, "failures": names} of the whole matrix."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run(pytest_command(*FOLDERS, f"--junitxml={report}"), cwd=stamp.ROOT, env=environment())
        return outcome(report.read_text(encoding="utf-8")) if report.exists() else outcome("<testsuite/>")


def outcome(junit: str) -> dict:
    """The counts in pytest's XML report."""
    result = {"passed": 0, "failed": 0, "skipped": Counter(), "failures": []}
    for case in ElementTree.fromstring(junit).iter("testcase"):
        skipped = case.find("skipped")
        if skipped is not None:
            result["skipped"][skipped.get("message", "")] += 1
        elif case.find("failure") is not None or case.find("error") is not None:
            result["failed"] += 1
            result["failures"].append(f"{case.get('classname')}::{case.get('name')}")
        else:
            result["passed"] += 1
    return result


def run_sanitizer(tool: str) -> dict:
    """{"errors": n, "tests_passed": bool}, or {"unavailable": why}: compute-sanitizer does not run everywhere."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        return {"unavailable": "compute-sanitizer is not installed"}
    options = [program, f"--tool={tool}", "--target-processes=all", "--error-exitcode=0"]
    # without torch's caching allocator every tensor is an allocation of its own, with bounds to check
    uncached = environment() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [*options, *pytest_command(SANITIZER_FOLDER, "-m", "quick")]
    try:
        done = subprocess.run(
            command, cwd=stamp.ROOT, env=uncached, capture_output=True, text=True, timeout=SANITIZER_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"unavailable": f"no end within {SANITIZER_SECONDS} seconds"}
    return verdict(done.stdout + done.stderr, done.returncode)


def verdict(output: str, status: int) -> dict:
    if "Device not supported" in output:
        return {"unavailable": "compute-sanitizer refuses this device"}
    summaries = _SUMMARY.findall(output)
    if not summaries:
        return {"unavailable": "no summary: " + " | ".join(output.strip().splitlines()[-3:])}
    result = {"errors": sum(map(int, summaries)), "tests_passed": status == 0}
    if result["errors"]:
        result["first"] = [line for line in output.splitlines() if line.startswith("=========")][:40]
    return result


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def complaints(result: dict) -> list[str]:
    """Why the record is not a pass."""
    tests = result["tests"]
    found = [f"failed: {name}" for name in tests["failures"]]
    found += ["no test ran"] * (not tests["passed"])
    found += [f"{n} tests skipped: {why}" for why, n in tests["skipped"].items() if not SKIPS_ALLOWED.search(why)]
    for tool, seen in result["sanitizer"].items():
        if "unavailable" in seen:
            found.append(f"{tool} did not run: {seen['unavailable']}")
        elif seen["errors"] or not seen["tests_passed"]:
            found.append(f"{tool}: {seen['errors']} errors, tests {'passed' if seen['tests_passed'] else 'failed'}")
    return found


def main() -> int:
    try:
        import torch
    except ModuleNotFoundError:
        print("make gpu: this Python has no torch (PYTHON=... chooses another)", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("make gpu: no CUDA GPU here; nothing was run and nothing recorded", file=sys.stderr)
        return 2
    result = {
        "stamp": stamp.stamp(),
        "tests": run_tests(),
        "sanitizer": {tool: run_sanitizer(tool) for tool in SANITIZER_TOOLS},
    }
    result["complaints"] = complaints(result)
    file = stamp.RESULTS / stamp.folder_of(result["stamp"]["device"]) / "correctness.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(file.relative_to(stamp.ROOT), *(result["complaints"] or ["all passed"]), sep="\n  ")
    return int(bool(result["complaints"]))


if __name__ == "__main__":
    sys.exit(main())
