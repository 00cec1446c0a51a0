"""What the command line reads of its surroundings: where its output goes, and variables that a scheduler sets."""

import io
import os
import subprocess
import sys

import pytest

from moe_unlearn.cli import main
from moe_unlearn.cli.arguments import writable
from tests.support.sources import ROOT

# what torchrun sets of each of its processes
RANK = dict(RANK="0", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1", WORLD_SIZE="2")


def test_a_stream_may_be_the_output(tmp_path):
    """Nothing is written to it for a trial: a pipe without a reader would wait for one."""
    os.mkfifo(tmp_path / "pipe")
    for stream in (tmp_path / "pipe", "/proc/self/fd/1", "/dev/stdout"):
        writable(stream)
    with pytest.raises(NotADirectoryError, match="--out cannot be written"):
        writable("/dev/stdout", folder=True)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("words", "buffered"),
    [(["env"], True), (["env"], False), (["--help"], True), (["report", "nowhere"], True)],
    ids=["env", "unbuffered", "help", "report"],
)
def test_a_reader_that_goes_away_is_no_error(words, buffered, monkeypatch, capsys):
    """With `moe-unlearn env | head -1` what is left to print goes nowhere, and neither do complaints."""
    read, write = os.pipe()
    os.close(read)
    errors = io.StringIO()
    with open(write, "w", encoding="utf-8") as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        patch.setattr(sys, "stderr", errors)
        if buffered:
            print("waits in the buffer", file=closed)
        else:
            closed.reconfigure(write_through=True)
        assert main(words) == 141
        print("more", file=closed, flush=True)
    assert errors.getvalue() == "" == capsys.readouterr().err


@pytest.mark.quick
@pytest.mark.parametrize("variables", [{}, RANK], ids=["alone", "rank"])
def test_a_process_ends_with_its_code_after_threads_and_exit_functions(variables):
    """A rank ends as a process that is alone does, but for what its interpreter frees."""
    program = """
import atexit, threading, time
from moe_unlearn.cli.launch import end
class Freed:
    def __del__(self, write=__import__("os").write): write(1, b" freed")
freed = Freed()
atexit.register(print, "exit function", end="")
atexit.register(lambda: 1 / 0)
threading.Thread(target=lambda: (time.sleep(0.2), print("thread, ", end=""))).start()
end(3)
"""
    alone = {name: value for name, value in os.environ.items() if name not in RANK}
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, env=alone | variables, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 3
    assert ended.stdout == "thread, exit function" + ("" if variables else " freed")
    assert "ZeroDivisionError" in ended.stderr


@pytest.mark.quick
@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "all"])
def test_a_scheduler_that_tells_a_number_of_processes_starts_no_ranks(missing, monkeypatch, capsys):
    """Only who sets all that torchrun sets does; the others would never meet."""
    for name, value in RANK.items():
        monkeypatch.delenv(name, raising=False)
        if missing not in (name, "all"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["env"]) == 0
    assert "python" in capsys.readouterr().out
