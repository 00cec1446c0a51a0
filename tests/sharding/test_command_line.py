"""The command line under torchrun: two ranks give what one process gives, and one rank's error ends both."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from moe_unlearn import delta
from moe_unlearn.cli import main
from moe_unlearn.masks import WeightMask
from tests.support import command_line_child
from tests.support.command_line import arguments, saved
from tests.support.command_line_child import commands, unlearning, writing
from tests.support.forked_ranks import launched
from tests.support.sources import ROOT

pytestmark = pytest.mark.slow

CHILD = "tests.support.command_line_child"
FAILING = {"unknown", "refused", "missing", "one", "fault", "parted", "pipe", "other ranks", "relearn"}


def torchrun(*command, **environment):
    """Run a module on two ranks as a user does; return the finished process."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    own = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([*launcher, "-m", *map(str, command)], cwd=ROOT, env=own, capture_output=True, timeout=300)


def commanded(folder, only=None, **environment):
    """Return how two ranks end that run the commands in `folder` one after the other, or `only` one of them."""
    # as torchrun's agent, which has the store in which the ranks of each command meet
    store = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}

    def act(rank):
        os.environ.update(meeting | environment)
        command_line_child.run(folder, only)

    return launched(2, folder, act)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def weights(out):
    return load_file(out / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("command_line")
    saved(root)
    return root


@pytest.fixture(scope="module")
def ranks(folder):
    """Return what both ranks printed and returned, by the command's name."""
    assert commanded(folder) == [0, 0], [path.read_text(encoding="utf-8") for path in folder.glob("error*")]
    return [read(folder / f"rank{rank}.json") for rank in range(2)]


def test_the_first_rank_alone_prints(ranks):
    first, second = ranks
    assert all(found["out"] == found["err"] == "" for name, found in second.items() if name not in FAILING)
    assert all(second[name]["out"] == "" for name in FAILING)
    assert all(first[name]["code"] == second[name]["code"] == 0 for name in first.keys() - FAILING)
    assert "moe-unlearn run: error" not in first["run"]["err"]


def test_a_run_has_the_weights_of_one_process(ranks, folder):
    assert main(unlearning(folder, "alone", "accumulate=2")) == 0
    alone, together, resumed = (weights(folder / out) for out in ("alone", "run", "resumed"))
    before = load_file(folder / "model" / "model.safetensors")
    assert any(not torch.equal(alone[name], before[name]) for name in alone)
    assert all(torch.equal(resumed[name], together[name]) for name in alone)
    moved = math.sqrt(sum(float((alone[name] - before[name]).square().sum()) for name in alone))
    apart = math.sqrt(sum(float((alone[name] - together[name]).square().sum()) for name in alone))
    assert apart <= 1e-3 * moved  # sums are rounded otherwise
    assert read(folder / "run" / "batch.json") == {
        "ranks": 2,
        "batch_size": 3,
        "accumulate": 1,
    }
    one, two = (
        [step["forget_loss"] for step in read(folder / out / "trajectory.json")["npo"]] for out in ("alone", "run")
    )
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("mesh", ["fsdp", "experts"])
def test_a_mesh_shares_out_the_weights_of_a_run(mesh, ranks, folder):
    """And its weights are those of ranks that hold them whole, which are those of one process."""
    whole, parts, before = (weights(folder / out) for out in ("run", mesh, "."))
    moved = math.sqrt(sum(float((whole[name] - before[name]).square().sum()) for name in before))
    apart = math.sqrt(sum(float((whole[name] - parts[name]).square().sum()) for name in before))
    assert moved > 0 and apart <= 1e-3 * moved  # sums are rounded otherwise
    saved = folder / mesh / "checkpoints" / "checkpoint-4" / "unlearn_step"
    assert sorted(path.name for path in saved.iterdir()) == [
        "manifest",
        "rank-00000.safetensors",
        "rank-00001.safetensors",
        "state.json",
    ]


def test_a_mesh_writes_the_alternates_of_one_process(ranks, folder):
    assert main(writing(folder, "alternates.jsonl")) == 0
    one, shared = ((folder / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("alternates", "alternates-fsdp"))
    assert one == shared and len(one.splitlines()) > 1


def without(option, command):
    """A command without an option that has one value."""
    at = command.index(option)
    return command[:at] + command[at + 2 :]


def test_shared_out_weights_are_measured_as_one_process_measures(ranks, folder):
    """Every rank makes its passes with its batches, so that its bits are theirs, but for experts on other ranks."""
    one = without("--mesh", commands(folder, 0)["eval fsdp"])
    assert main([*one[:-1], str(folder / "one-eval.json")]) == 0
    assert (folder / "one-eval.json").read_bytes() == (folder / "eval-fsdp.json").read_bytes()
    assert {"minkauc", "routing_overlap", "gibberish"} <= read(folder / "eval-fsdp.json").keys()
    run = without("--mesh", commands(folder, 0)["fsdp"])
    run[run.index("--out") + 1] = str(folder / "one-run")
    assert main([*run, "accumulate=2"]) == 0
    alone, parts, experts = (read(folder / out / "summary.json") for out in ("one-run", "fsdp", "experts"))
    assert alone["target"] == parts["target"] and alone["retrain"] == parts["retrain"]
    for name in ("target", "npo"):
        assert {k: v for k, v in parts[name].items() if k != "seconds"} == pytest.approx(
            {k: v for k, v in alone[name].items() if k != "seconds"}, rel=1e-4
        )
        assert {k: experts[name][k] for k in ("nll_f", "nll_r")} == pytest.approx(
            {k: alone[name][k] for k in ("nll_f", "nll_r")}, rel=1e-4
        )


def test_shared_out_weights_have_the_statistics_and_the_mask_of_whole_ones(ranks, folder):
    assert (folder / "stats.json").read_bytes() == (folder / "stats-fsdp.json").read_bytes()
    whole, parts = (WeightMask.load(folder / f"{name}.safetensors") for name in ("mask", "mask-fsdp"))
    differing = sum(int((whole.kept(name) != parts.kept(name)).sum()) for name in whole.names)
    assert whole.fraction > 0.29 and differing <= 1e-3 * sum(whole.kept(name).numel() for name in whole.names)


def test_a_mesh_writes_the_delta_of_its_run(ranks, folder, tmp_path):
    path = folder / "experts" / "delta.safetensors"
    assert f"delta: {path}: " in ranks[0]["experts"]["out"]
    assert delta.apply(folder / "model", path, tmp_path / "model").digest == delta.read(path).result
    made, kept = weights(tmp_path), weights(folder / "experts")
    assert made.keys() == kept.keys() and all(torch.equal(made[name], kept[name]) for name in made)


def test_a_run_is_evaluated_and_reported_once(ranks, folder):
    assert (
        main(unlearning(folder, "one", "accumulate=2", steps=1, options=("--holdout", str(folder / "holdout.jsonl"))))
        == 0
    )
    one, two = (read(folder / out / "summary.json") for out in ("one", "evaluated"))
    for name in ("target", "npo"):
        assert {k: v for k, v in two[name].items() if k != "seconds"} == pytest.approx(
            {k: v for k, v in one[name].items() if k != "seconds"}, rel=1e-5
        )
    report = (folder / "evaluated" / "report.md").read_text(encoding="utf-8")
    assert "6 forget rows with their retain rows: 2 (ranks) x 3 (batch_size) x 1 (accumulate)" in report
    assert main(["report", str(folder / "evaluated")]) == 0
    assert report == (folder / "evaluated" / "report.md").read_text(encoding="utf-8")


def test_a_run_on_shared_weights_is_verified_against_one_process(ranks, folder):
    assert f"verified: {folder / 'verified' / 'verified.txt'}" in ranks[0]["verify"]["out"]
    found, parted = ((folder / out / "verified.txt").read_text(encoding="utf-8") for out in ("verified", "parted"))
    assert found.count("step 1: equals the plain step") == 1 and "step 2" not in found
    assert parted.count("step 1: NOT the plain step") == 1 and not (folder / "parted" / "model").exists()


def test_the_plan_is_that_of_ranks_and_help_says_what_a_step_is(ranks, folder):
    assert "the gradients of 2 ranks are added up" in ranks[0]["plan"]["out"]
    assert not (folder / "plan").exists()
    assert "N processes share the rows" in " ".join(ranks[0]["help"]["out"].split())


@pytest.mark.parametrize("verb", ["eval", "stats", "mask"])
def test_what_ranks_measure_is_what_one_process_does(verb, ranks, folder, capsys):
    *command, together = commands(folder, 0)[verb]
    alone = folder / f"alone-{verb}.out"
    assert main([*command, str(alone)]) == 0
    one, two = (path.read_bytes() for path in (alone, Path(together)))
    if verb == "stats":
        assert one == two and capsys.readouterr().out == ranks[0][verb]["out"]
    elif verb == "eval":  # rows in batches of other sizes are rounded otherwise
        assert json.loads(two) == pytest.approx(json.loads(one), rel=1e-5)
    else:  # gradients are added up in another order, so that weights next to the threshold may change sides
        mine, theirs = (WeightMask.load(path) for path in (alone, together))
        differing = sum(int((mine.kept(name) != theirs.kept(name)).sum()) for name in mine.names)
        assert mine.fraction == pytest.approx(theirs.fraction, rel=1e-3) and mine.fraction > 0.29
        assert differing <= 1e-3 * sum(mine.kept(name).numel() for name in mine.names)


@pytest.mark.parametrize(
    ("name", "codes", "rank", "words"),
    [
        ("unknown", [2, 2], 0, "unrecognized arguments: --wrong"),
        ("refused", [2, 2], None, "report: error: expected one process; ranks share the work of stats, mask"),
        ("missing", [2, 2], None, "stats: error: expected a model folder written by save_pretrained"),
        ("one", [2, 2], 1, "none.jsonl"),
        ("fault", [2, 1], 1, "KeyError: 'a fault of the program'"),
        ("parted", [2, 2], None, "above the criterion: weight model.embed_tokens.weight: rank 1 has other bits"),
        ("other ranks", [2, 2], None, "run: error: --mesh is of 3 ranks (fsdp 3); this run has 2: start it with"),
        ("relearn", [2, 2], None, "eval: error: --relearn needs whole weights on every rank; leave out --mesh"),
    ],
)
def test_an_error_ends_all_ranks_and_is_said_once(name, codes, rank, words, ranks):
    """The rank that met the error says it; of an error that both meet, either may be the one."""
    found = [both[name] for both in ranks]
    assert [one["code"] for one in found] == codes
    said = [words in one["err"] for one in found]
    assert sum(said) == 1 and (rank is None or said[rank])
    assert sum("error" in one["err"].lower() for one in found) == 1


def test_a_reader_that_goes_away_ends_both_ranks_without_a_word(ranks):
    assert [found["pipe"] for found in ranks] == [{"code": code, "out": "", "err": ""} for code in (141, 2)]


def test_the_next_command_finds_no_trace_of_a_failed_one(ranks, folder):
    assert [found["again"]["code"] for found in ranks] == [0, 0]
    assert (folder / "again.json").read_bytes() == (folder / "stats.json").read_bytes()
    assert not (folder / "fault.json").exists()


def test_a_rank_killed_in_a_step_ends_the_other_with_a_message(folder):
    assert commanded(folder, "fsdp", FAULT="killed") == [0, -signal.SIGKILL]
    found = read(folder / "rank0.json")["fsdp"]
    assert found["code"] == 2
    assert "moe-unlearn: error: rank 0 lost another rank" in found["err"].splitlines()[-1]


@pytest.mark.nightly
def test_torchrun_says_which_rank_was_killed_and_ends_the_other(tmp_path):
    saved(tmp_path)
    ended = torchrun(CHILD, tmp_path, "fsdp", FAULT="killed")
    said = ended.stderr.decode()
    assert ended.returncode == 1 and "rank      : 1 (local_rank: 1)" in said and "Signal 9 (SIGKILL)" in said
    assert (tmp_path / "fsdp" / "recipe.yaml").exists() and not (tmp_path / "fsdp" / "model").exists()


def test_the_module_is_what_torchrun_starts(folder):
    ended = torchrun("moe_unlearn", "stats", *arguments(folder), "--out", folder / "module.json")
    assert ended.returncode == 0, ended.stderr.decode()
    assert ended.stdout.decode().count("experts selected in 2 layers") == 1
    assert read(folder / "module.json")["forget"]["tokens"] > 0


def test_a_thread_that_waits_for_the_interpreter_lets_a_rank_end(folder):
    command = ["stats", *arguments(folder), "--out", folder / "ended.json"]
    ended = torchrun("tests.support.ending_child", *command)
    assert ended.returncode == 0, ended.stderr.decode()
    assert ended.stdout.decode().count("exit functions run") == 2
    assert (folder / "ended.json").exists()
