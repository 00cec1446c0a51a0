"""A checkpoint of UnlearnTrainer on sharded weights is resumed by any number of ranks, of any engine, and by one."""

import shutil
from unittest import mock

import peft
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, Trainer
from transformers.distributed import DistributedConfig

from moe_unlearn.checkpoint import CheckpointError
from moe_unlearn.checkpoint.sharded import entries
from moe_unlearn.data import ForgetRetainDataset
from moe_unlearn.trainer import UnlearnTrainer
from tests.support.forked_ranks import found_on
from tests.support.models import tiny_olmoe
from tests.support.sharded_child import shard, weights_of
from tests.support.steps import recipe
from tests.support.trainer_child import FSDP, forced
from tests.support.training import VOCAB, arguments, examples

pytestmark = pytest.mark.slow

OVERRIDES = ("optimizer.name=adamw", "optimizer.weight_decay=0.1", "wagle={keep: 0.3}", "scope.kind=experts")
AT = "checkpoint-2"
# from the checkpoint of (ranks, engine) to the ranks of another
RESUMED = {
    "fsdp2 to 2": ("fsdp2", 2),
    "fsdp2 to 3": ("fsdp2", 3),
    "ep4 to 2": ("ep4", 2),
    "replicas to 2": ("replicas", 2),
    "one to 2": ("one", 2),
    "one without optimizer to 2": ("one without optimizer", 2),
    "fsdp2 without optimizer to 2": ("fsdp2 without optimizer", 2),
}
BY_ACCELERATE = {"fsdp2 to accelerate": ("fsdp2", 2), "one to accelerate": ("one", 2)}


def model(seed=0):
    torch.manual_seed(seed)
    return tiny_olmoe(VOCAB).double().eval()


def adapted(seed=0):
    """The model with adapters, which alone depend on the seed."""
    made = model()
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=experts, init_lora_weights=False)
    torch.manual_seed(seed)
    return peft.get_peft_model(made, settings).double().eval()


def messages(rank, folder, saved):
    """Return what a rank says of its own error, and of another's, where a Trainer's ranks wait for one another."""
    run = trainer(shard(model()), folder, "npo", save_strategy="no", ddp_backend="gloo", gradient_accumulation_steps=2)
    collate, draw = run.data_collator, Trainer.get_batch_samples
    batch = run._prepare_inputs(next(iter(run.get_train_dataloader())))

    def unreadable(items):
        if rank == 1:
            raise OSError("a row that cannot be read")
        return collate(items)

    def fewer(self, *args):
        samples, items = draw(self, *args)
        return samples[rank:], items

    def one_sided(items):
        return {side: rows for side, rows in collate(items).items() if side == "forget" or not rank}

    def stop(act):
        try:
            act()
        except (ValueError, OSError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    def evaluate(batch):
        return stop(lambda: run.prediction_step(run.model, batch, True))

    bad = {side: {key: t for key, t in rows.items() if key != "labels" or not rank} for side, rows in batch.items()}
    found = {"a bad batch": evaluate(bad), "no pair": evaluate(batch if rank else batch["retain"])}
    elsewhere = str(saved / AT) if rank == 0 else str(folder / AT)
    found["another disk"] = stop(lambda: run.train(resume_from_checkpoint=elsewhere))
    run.data_collator = unreadable
    found["preparing"] = stop(run.train)
    run.data_collator = collate
    run.prepare()
    with mock.patch.object(UnlearnTrainer, "prepare"):
        for name, run.data_collator in (("drawing", unreadable), ("one side", one_sided)):
            found[name] = stop(run.train)
        run.data_collator = collate
        with mock.patch.object(Trainer, "get_batch_samples", fewer):
            found["fewer"] = stop(run.train)
    return found


def trainer(made, folder, base="trace", **keywords):
    """A trainer whose 12 micro-batches of an epoch 1, 2, 3 and 4 ranks share without a rest."""
    pairs = ForgetRetainDataset(examples(24, 1), examples(24, 2), seed=0)
    settings = arguments(folder, max_steps=keywords.pop("max_steps", 4), **keywords)
    settings.per_device_train_batch_size = 2
    changes = OVERRIDES if base == "trace" else OVERRIDES[:2]
    return UnlearnTrainer(made, settings, recipe(base, *changes, lr=1e-2), pairs)


def keep(run, rank, path):
    weights = weights_of(run.unlearn_step)
    if rank == 0:
        save_file(weights, path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of checkpoints of two runs, and the weights of those that were resumed from them."""
    root = tmp_path_factory.mktemp("resumed")
    model().save_pretrained(root / "hub")

    def experts(rank):
        config = DistributedConfig(fsdp_size=4, ep_size=2)
        made = tiny_olmoe(VOCAB).__class__.from_pretrained(
            root / "hub", distributed_config=config, dtype=torch.float64, experts_implementation="grouped_mm"
        )
        trainer(made.eval(), root / "ep4", ddp_backend="gloo").train()
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "fsdp"))
        trainer(shard(model(), mesh=mesh), root / "replicas", ddp_backend="gloo").train()

    def whole(rank):
        run = trainer(shard(model()), root / "fsdp2", ddp_backend="gloo")
        run.train()
        for _ in range(2):  # the second finds a model in the folder
            run.save_model()
        keep(run, rank, root / "whole.safetensors")
        trainer(shard(model()), root / "fsdp2 without optimizer", save_only_model=True, ddp_backend="gloo").train()

    def resumed(rank):
        for name, (saved, count) in RESUMED.items():
            if count == distributed.get_world_size():
                run = trainer(shard(model(1)), root / "again", save_strategy="no", ddp_backend="gloo")
                run.train(resume_from_checkpoint=str(root / saved / AT))
                keep(run, rank, root / f"{name}.safetensors")

    def accelerated(rank):
        cases = {name: (saved, model(1), "trace") for name, (saved, _) in BY_ACCELERATE.items()}
        cases["lora to accelerate"] = "lora", adapted(1), "npo"
        for name, (saved, made, base) in cases.items():
            AcceleratorState._reset_state()
            with mock.patch.object(AcceleratorState, "__init__", forced):
                run = trainer(made, root / f"{base} accelerate", base, ddp_backend="gloo", **FSDP)
                run.train(resume_from_checkpoint=str(root / saved / AT))
            assert run.is_fsdp_enabled
            keep(run, rank, root / f"{name}.safetensors")

    def adapters(rank):
        run = trainer(shard(adapted()), root / "lora", "npo", ddp_backend="gloo")
        run.train()
        keep(run, rank, root / "whole lora.safetensors")
        run = trainer(shard(adapted(1)), root / "again", "npo", save_strategy="no", ddp_backend="gloo")
        run.train(resume_from_checkpoint=str(root / "lora" / AT))
        keep(run, rank, root / "lora to 2.safetensors")

    for name, only in (("one", False), ("one without optimizer", True)):
        trainer(model(), root / name, gradient_accumulation_steps=2, save_only_model=only).train()
    found_on(2, root / "meet lora", adapters)
    found_on(4, root / "meet ep4", experts)
    found_on(2, root / "meet fsdp2", whole)
    found_on(2, root / "meet two", resumed)
    found_on(3, root / "meet three", resumed)
    found_on(2, root / "meet accelerate", accelerated)
    return root


@pytest.fixture(scope="module")
def said(runs):
    """Return what each of two ranks says of its own errors, and of the other's."""
    return found_on(2, runs / "meet stopped", lambda rank: messages(rank, runs / "out", runs / "fsdp2"))


def differences(ours, theirs, started=None):
    """Names of weights that differ by more than sums of float64 in another order do."""
    start = dict((model() if started is None else started).named_parameters())
    apart = {name: (ours[name] - theirs[name]).abs().max() for name in theirs}
    return [name for name in theirs if apart[name] > 1e-9 * (theirs[name] - start[name].detach()).abs().max()]


@pytest.mark.parametrize("name", [*RESUMED, *BY_ACCELERATE])
def test_any_ranks_go_on_as_one_process_does(name, runs, tmp_path):
    saved, count = (RESUMED | BY_ACCELERATE)[name]
    one = trainer(model(2), tmp_path, save_strategy="no", gradient_accumulation_steps=count)
    one.train(resume_from_checkpoint=str(runs / saved / AT))
    assert one.unlearn_step.steps == 4
    ours, theirs = load_file(runs / f"{name}.safetensors"), weights_of(one.unlearn_step)
    assert any(not torch.equal(theirs[key], p) for key, p in model().named_parameters())
    assert differences(ours, theirs) == []


def test_what_ranks_have_saved_does_not_outlive_the_checkpoint_of_a_later_run(runs, tmp_path):
    shutil.copytree(runs / "fsdp2" / AT, tmp_path / AT)
    run = trainer(model(), tmp_path)
    run.train()
    again = trainer(model(1), tmp_path, save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / AT))
    assert again.unlearn_step.steps == 4
    ours, theirs = weights_of(again.unlearn_step), weights_of(run.unlearn_step)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("internal", [False, True])
def test_a_model_that_the_user_saves_is_pushed_as_transformers_does(internal, tmp_path):
    run = trainer(model(), tmp_path)
    run.args.push_to_hub = True
    with mock.patch.object(run.unlearn_step.ranks, "sharded", True), mock.patch.object(run, "push_to_hub") as pushed:
        run.save_model(_internal_call=internal)
    assert pushed.called is not internal and (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["fsdp2 to 2", "fsdp2 to accelerate"])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(name, runs):
    ours, theirs = (load_file(runs / f"{run}.safetensors") for run in (name, "whole"))
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("saved", ["fsdp2/checkpoint-4", "trace accelerate/checkpoint-4", "fsdp2"])
def test_the_folder_of_a_checkpoint_is_a_model_and_one_is_saved_beside_them(saved, runs):
    """That the checkpoints outlive a model that is saved beside them is what the resumed runs show."""
    last = AutoModelForCausalLM.from_pretrained(runs / saved, dtype=torch.float64)
    theirs = load_file(runs / "whole.safetensors")
    assert all(torch.equal(p, theirs[name]) for name, p in last.named_parameters())


@pytest.mark.parametrize("name, saved", [("lora to 2", "lora"), ("lora to accelerate", "npo accelerate")])
def test_adapters_are_saved_as_peft_does_and_resumed(name, saved, runs, tmp_path):
    ours, theirs = (load_file(runs / f"{run}.safetensors") for run in (name, "whole lora"))
    assert any(not torch.equal(theirs[name], p) for name, p in adapted().named_parameters())
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    folder = runs / saved / "checkpoint-4"
    assert not list(folder.glob("model*.safetensors"))
    stored = sum(path.stat().st_size for path in (folder / "unlearn_step").iterdir())
    assert stored < sum(p.nbytes for p in model().parameters()), "the weights of the base model are not stored"
    loaded = peft.PeftModel.from_pretrained(model(), folder)
    assert [name for name, p in loaded.named_parameters() if not torch.equal(p, theirs[name])] == []
    one = trainer(adapted(2), tmp_path, "npo", save_strategy="no", gradient_accumulation_steps=2)
    one.train(resume_from_checkpoint=str(runs / "lora" / AT))
    assert differences(theirs, weights_of(one.unlearn_step), adapted()) == []


STOPPED = {
    "a bad batch": ("RankError: rank 1 stopped: ValueError: ", "ValueError: "),
    "no pair": ("ValueError: expected whether a batch is a pair to be the same on all 2 ranks; they differ",) * 2,
    "another disk": ("CheckpointError: ",) * 2,
    "preparing": ("RankError: rank 1 stopped: OSError: a row that cannot", "OSError: a row that cannot be read"),
    "drawing": ("RankError: rank 1 stopped: OSError: a row that cannot", "OSError: a row that cannot be read"),
    "one side": ("RankError: rank 1 stopped: ValueError: expected batches", "ValueError: expected batches"),
    "fewer": ("ValueError: expected the number of micro-batches to be the same on all 2 ranks; they differ",) * 2,
}


@pytest.mark.parametrize("name", STOPPED)
def test_an_error_of_one_rank_ends_all(name, said):
    for found, words in zip(said, STOPPED[name], strict=True):
        assert found[name].startswith(words)


@pytest.mark.parametrize("name", ["one", "fsdp2"])
def test_a_checkpoint_of_the_model_only_has_neither_optimizer_nor_schedule(name, runs):
    def of(saved):
        return {str(path.relative_to(runs / saved / AT)): path for path in (runs / saved / AT).rglob("*")}

    left_out = of(name).keys() - of(f"{name} without optimizer").keys()
    if name == "one":
        assert {"optimizer.safetensors", "optimizer.json", "random.json"} == left_out
    else:
        assert entries(runs / "fsdp2 without optimizer" / AT / "unlearn_step") == ["step"]
    assert (
        of(f"{name} without optimizer")["model.safetensors"].read_bytes() == of(name)["model.safetensors"].read_bytes()
    )


def test_adapters_of_whole_weights_are_no_checkpoint_of_parts(tmp_path):
    trainer(adapted(), tmp_path, "npo").train()
    run = trainer(adapted(), tmp_path, "npo")
    with (
        mock.patch.object(run.unlearn_step.ranks, "sharded", True),
        pytest.raises(CheckpointError, match="has adapters of whole weights"),
    ):
        run.train(resume_from_checkpoint=True)
