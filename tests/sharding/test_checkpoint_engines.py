"""What ranks of one engine saved, ranks of another go on from, with the bits of one process."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from moe_unlearn.checkpoint import CheckpointError, latest, sharded, states, verify
from moe_unlearn.checkpoint.sharded import Slices
from tests.sharding import checkpoint_child as child
from tests.sharding.checkpoint_child import OLD, RANKS, RESUMED, Trained
from tests.support.forked_ranks import found_on
from tests.support.steps import weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> tuple[Path, list[dict]]:
    """The folder of four ranks, and what each of them found."""
    folder = tmp_path_factory.mktemp("ranks")
    for seed in (0, 1):
        child.model(seed).save_pretrained(folder / f"seed{seed}")
    one = Trained(child.model())
    one.step()
    sharded.save(folder / "one", one.state())
    states.commit(folder, 1, one.state() | {"optimizer": one.moments()})
    return folder, found_on(RANKS, folder, lambda rank: child.found_by(rank, folder))


def after(steps: int) -> Trained:
    made = Trained(child.model())
    for _ in range(steps):
        made.step()
    return made


@pytest.mark.parametrize("saved, engine", RESUMED)
def test_a_step_after_resuming_is_the_step_of_one_process(ranks, saved, engine):
    folder = ranks[0] / "hub" / f"{saved}-{engine}"
    loaded, gold = AutoModelForCausalLM.from_pretrained(folder), after(2).model
    start, once = weights(child.model()), weights(after(1).model)
    for name, p in gold.named_parameters():
        assert torch.equal(loaded.get_parameter(name), p), name
        assert torch.equal(p, once[name]) == torch.equal(once[name], start[name]) == ("k_proj" in name)


@pytest.mark.parametrize("saved", ["fsdp2", "ep4"])
def test_one_process_goes_on_from_ranks(ranks, saved):
    one = Trained(child.model(1))
    one.load(ranks[0] / saved)
    for name, state in after(1).moments().items():
        found = one.moments()[name]
        assert found.keys() == state.keys(), name
        assert all(torch.equal(found[key], value) for key, value in state.items()), name
    one.step()
    gold = after(2).model
    assert all(torch.equal(one.parameters[name], p) for name, p in gold.named_parameters())


@pytest.mark.parametrize("saved, files", [("fsdp2", 2), ("ep4", 4), ("one", 1)])
def test_a_checkpoint_is_safetensors_and_json(ranks, saved, files):
    folder = ranks[0] / saved
    written = [f"rank-{rank:05d}.safetensors" for rank in range(files)]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*written, "state.json", "manifest"])
    assert verify(folder)["files"].keys() == {*written, "state.json"}
    json.loads((folder / "state.json").read_text(encoding="utf-8"))
    sizes = []
    for name in written:
        with safe_open(folder / name, "pt") as file:
            sizes.append(sum(file.get_tensor(key).numel() for key in file.keys()))
    assert min(sizes) > 0.5 * max(sizes)  # each rank writes what it holds


def test_everything_is_read_without_targets(ranks):
    found, expected = sharded.load(ranks[0] / "ep4"), after(1)
    assert all(torch.equal(found["model"][name], t) for name, t in expected.model.state_dict().items())
    moments = found["optimizer"]["model.layers.0.mlp.experts.gate_up_proj"]["exp_avg"]
    assert isinstance(moments, Slices) and moments.ids.tolist() == [1, 2, 5]
    assert found["run"]["steps"] == 1 and found["run"]["nan"] != found["run"]["nan"]
    assert sharded.load(ranks[0] / "ep4", states=["run"]).keys() == {"run"}
    with pytest.raises(CheckpointError, match="it has no other"):
        sharded.load(ranks[0] / "ep4", states=["other"])


def test_a_checkpoint_of_ranks_is_not_read_as_one_of_a_process(ranks):
    with pytest.raises(CheckpointError, match="see `sharded.load`"):
        states.load(ranks[0] / "fsdp2")
    assert latest(ranks[0]).name == OLD


def test_the_hubs_files_are_at_most_so_large_and_hold_no_trace_of_ranks(ranks):
    for path in (ranks[0] / "hub").iterdir():
        index = json.loads((path / "model.safetensors.index.json").read_text(encoding="utf-8"))
        files = set(index["weight_map"].values())
        assert {p.name for p in path.iterdir()} == files | {
            "config.json",
            "generation_config.json",
            "model.safetensors.index.json",
        }
        assert len(files) > 3 and all((path / name).stat().st_size < 50_000 for name in files)
        for name in files:
            with safe_open(path / name, "pt") as file:
                assert set(file.keys()) == {key for key, where in index["weight_map"].items() if where == name}
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        assert config["architectures"] == ["OlmoeForCausalLM"] and "distributed_config" not in config


def test_torchs_own_storage_loses_what_differs_from_rank_to_rank(ranks):
    """Why `Slices` have ids of the whole: a test that notices when it changes."""
    assert [found["lost"] for found in ranks[1]] == [[0.0, 0.0]] * RANKS


@pytest.mark.parametrize(
    "case, said",
    [
        ("plain", "expected m to be the same tensor on all ranks; they differ: if each has its own, pass a DTensor"),
        ("json", "expected here/n to be the same on all ranks; they differ"),
        ("type", "n: a checkpoint holds no set"),
        ("runs", "m: ranks have different runs of the same slices"),
        ("placement", "expected each rank to hold one block of a tensor; got placements"),
        ("target", "m: expected 9 slices here; the checkpoint has 8"),
        ("damaged", "rank-00002.safetensors: expected"),
    ],
)
def test_what_would_be_lost_is_refused_on_all_ranks(ranks, case, said):
    for found in ranks[1]:
        assert said in found["misused"][case]
        assert found["misused"]["left"] == []


def test_slices_of_all_ranks_are_one_whole(ranks):
    for found in ranks[1]:
        assert found["misused"]["kept"] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_state_of_torchs_optimizer_is_shared_out_anew(ranks):
    assert all(found["of_torch"] for found in ranks[1])


def test_replicas_and_other_dimensions_are_shared_out_anew(ranks):
    assert all(found["replicas"] for found in ranks[1])
