"""A process that goes on for an hour keeps its memory, its open files and its threads.

`MOE_UNLEARN_SOAK_MINUTES` is how long it goes on; nightly, an hour.
"""

import gc
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from moe_unlearn.cli.main import main
from tests.support.command_line import saved
from tests.trust.commands import SIDES

MINUTES = float(os.environ.get("MOE_UNLEARN_SOAK_MINUTES", "60"))
WARM = 0.2  # the part of the time in which caches fill
HOUR = 16  # MiB: how much an hour may add


def now():
    """Return the resident MiB, the open files and the threads of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return int(status["VmRSS"].split()[0]) / 1024, len(os.listdir("/proc/self/fd")), int(status["Threads"])


@pytest.mark.nightly
def test_an_hour_leaves_no_more_than_its_first_minutes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path)
    model = ("--model", "model", *SIDES)
    commands = [
        ("stats", *model, "--out", "stats.json", "--cache", "cache"),
        ("mask", *model, "--memory", "64KiB", "--out", "mask.safetensors"),
        ("run", "combined", *model, "--out", "out", "--set", "steps=2", "batch_size=2", "data.max_length=24"),
        ("eval", *model, "--out", "eval.json"),
    ]
    begun, found = time.monotonic(), []
    while (passed := (time.monotonic() - begun) / 60) < MINUTES:
        for command in commands:
            assert main(command) == 0
        shutil.rmtree("out")
        gc.collect()
        found.append((passed, *now()))
    table = np.array([row for row in found if row[0] > WARM * MINUTES])
    assert len(table) > 10, f"expected more than {len(found)} rounds; give it more minutes"
    slope = np.polyfit(table[:, 0], table[:, 1], 1)[0] * 60
    told = f"{len(found)} rounds, {slope:+.2f} MiB an hour; the first and last: {found[0]}, {found[-1]}"
    print(told)
    assert slope * MINUTES / 60 < HOUR, told
    assert np.ptp(table[:, 2]) == 0 and np.ptp(table[:, 3]) == 0, told
