"""The tests that a library's products decide, as on processors that are not here.

    python -m tests.portable [--only WORD] [--jobs N]

Environment variables make the libraries compute as on other processors; each is asked for by itself whether it took
effect, and one that did not (this processor lacks it, or the library ignores it) is reported as not tested. Last come
the two extremes of what a reference can be measured by (`--yardstick`, `moe_unlearn.testing.yardstick`), which need no
other processor. At most a quarter of an hour on 2 cores.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from moe_unlearn.regress.fingerprint import cpu

# what the probe prints where a variable took effect
EFFECTS = {
    ("ONEDNN_MAX_CPU_ISA", "AVX2"): "isa:Intel AVX2",
    ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE"): "isa:Intel AVX-512 with AVX512BW",
    ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16"): "isa:Intel AVX-512 with Intel DL Boost and bfloat16",
    ("MKL_ENABLE_INSTRUCTIONS", "AVX2"): r"AVX2\) enabled",
    ("MKL_ENABLE_INSTRUCTIONS", "AVX512"): r"AVX-512\) enabled",
    ("MKL_CBWR", "COMPATIBLE"): "CNR:COMPATIBLE",
    ("MKL_CBWR", "AVX2"): "CNR:AVX2",
    ("MKL_CBWR", "AVX512"): "CNR:AVX512",
    ("ATEN_CPU_CAPABILITY", "default"): "capability:DEFAULT",
    ("ATEN_CPU_CAPABILITY", "avx2"): "capability:AVX2",
    ("ATEN_CPU_CAPABILITY", "avx512"): "capability:AVX512",
}
# a product by MKL, a convolution by oneDNN
PROBE = """
import torch
a = torch.ones(64, 64)
a @ a
torch.mkldnn_convolution(torch.ones(1, 4, 8, 8), torch.ones(4, 4, 3, 3), None, [0, 0], [1, 1], [1, 1], 1)
print("capability:" + torch.backends.cpu.get_cpu_capability())
"""

ROOT = Path(__file__).resolve().parent.parent


def of(op: str, folder: str) -> list[str]:
    """The tests of an op in a folder of tests."""
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests" / folder).glob(f"**/test_{op}*.py"))]


OPS = [
    path
    for folder in ("ops", "native")
    for op in ("expert_mlp", "expert_wgrad", "gram", "token_loss")
    for path in of(op, folder)
]
MODELS = ["tests/test_experts.py", "tests/test_experts_module.py", "tests/test_losses.py"]
STEPS = ["tests/test_step.py", "tests/test_fused.py", "tests/test_verify.py"]
REGRESS = ["tests/regress/test_seeded.py", "tests/regress/test_numeric.py"]
EVERY = [*OPS, *MODELS, *STEPS, *REGRESS]
# with exact products nearly every reference runs 16 times more: these stand for the others
EXTREMES = [
    *of("expert_mlp", "ops"),
    *of("expert_wgrad", "ops"),
    *of("expert_wgrad", "native"),
    *of("gram", "native"),
    *REGRESS,
    "tests/test_verify.py",
    "tests/test_testing.py",
]


class Setting(NamedTuple):
    """One run of the tests."""

    name: str
    variables: dict[str, str]
    threads: int = 1
    tests: list[str] = EVERY
    options: tuple[str, ...] = ()


SETTINGS = [
    Setting("AVX2", dict(ONEDNN_MAX_CPU_ISA="AVX2", MKL_ENABLE_INSTRUCTIONS="AVX2", ATEN_CPU_CAPABILITY="avx2")),
    Setting(
        "AVX-512",
        dict(ONEDNN_MAX_CPU_ISA="AVX512_CORE", MKL_ENABLE_INSTRUCTIONS="AVX512", ATEN_CPU_CAPABILITY="avx512"),
        2,
        [*OPS, *MODELS],
    ),
    Setting(
        "AVX-512 BF16", dict(ONEDNN_MAX_CPU_ISA="AVX512_CORE_BF16", MKL_CBWR="AVX512"), 1, [*OPS, *MODELS, *REGRESS]
    ),
    Setting("reproducible AVX2", dict(MKL_CBWR="AVX2"), 1, OPS),
    Setting("oldest", dict(MKL_CBWR="COMPATIBLE", ATEN_CPU_CAPABILITY="default")),
    Setting("exact products", {}, 1, EXTREMES, ("--yardstick", "exact")),
    Setting("sequential products", {}, 1, EXTREMES, ("--yardstick", "sequential")),
]


def took_effect(variable: str, value: str) -> bool:
    """Whether the library that reads a variable says that it did."""
    environment = os.environ | {"ONEDNN_VERBOSE": "1", "MKL_VERBOSE": "1", variable: value}
    done = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=False)
    return re.search(EFFECTS[variable, value], done.stdout) is not None


def run(setting: Setting, jobs: int) -> str:
    """One line: what was tested, what was not, and pytest's last line; "FAILED" stands in it if a test failed."""
    absent = [f"{k}={v}" for k, v in setting.variables.items() if not took_effect(k, v)]
    note = f"; not tested, no effect here: {', '.join(absent)}" if absent else ""
    if setting.variables and len(absent) == len(setting.variables):
        return f"{setting.name}: not tested, no effect here: {', '.join(absent)}"
    # threads of several processes, more than there are cores, must not wait for each other in loops
    threads = {"OMP_NUM_THREADS": str(setting.threads), "OMP_WAIT_POLICY": "passive"}
    environment = os.environ | setting.variables | threads
    jobs = max(1, jobs // setting.threads)
    # Triton's interpreter and emulated CUDA use no library's products
    options = ["--dist", "worksteal", "--impl=ref", "--impl=cpu", *setting.options]
    command = [sys.executable, "-m", "pytest", "-n", str(jobs), *options, *setting.tests]
    start = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-500:]]
    failed = "".join(f"\n    {line}" for line in lines if line.startswith(("FAILED", "ERROR")))
    verdict = "FAILED" if done.returncode else "passed"
    return f"{setting.name}: {verdict} in {time.monotonic() - start:.0f} s: {lines[-1]}{note}{failed}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="the settings with this word in their names, e.g. products")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    options = parser.parse_args(arguments)
    chosen = [setting for setting in SETTINGS if options.only in setting.name]
    print(f"{cpu()}, {len(chosen)} settings", flush=True)
    failures = 0
    for setting in chosen:
        line = run(setting, options.jobs)
        failures += ": FAILED" in line
        print(line, flush=True)
    print(f"{len(chosen) - failures} passed or not tested, {failures} failed")
    return int(failures > 0 or not chosen)


if __name__ == "__main__":
    sys.exit(main())
