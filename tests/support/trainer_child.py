"""Two ranks train a model whose weights each engine shares out; the first writes the weights."""

import os
import warnings
from pathlib import Path
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch import distributed, nn
from transformers.distributed import DistributedConfig

from moe_unlearn.data import ForgetRetainDataset
from moe_unlearn.trainer import UnlearnTrainer
from tests.support.models import tiny_olmoe
from tests.support.sharded_child import shard
from tests.support.steps import recipe
from tests.support.training import VOCAB, arguments, examples

ADAMW = ("optimizer.name=adamw", "optimizer.weight_decay=0.1", "optimizer.eps=1e-4")
CASES = {"npo": ADAMW, "combined": (*ADAMW, "mollm.kl_floor=0", "mollm.gradients=compact", "wagle.keep=0.3")}
FSDP = {"fsdp": True, "fsdp_config": {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
# those with the bits of one process, and those whose sums are in another order, in float64
BITWISE = ("native", "fully_shard", "accelerate")
CLOSE = ("experts", "micro-batches")
_INIT = AcceleratorState.__init__


def model() -> nn.Module:
    torch.manual_seed(0)
    return tiny_olmoe(VOCAB).eval()


def engine(name: str, folder: Path) -> tuple[nn.Module, dict]:
    """The model as an engine has it, and what it asks of the Trainer."""
    configs = {"native": {}, "experts": {"ep_size": 2}, "tensors": {"tp_size": 2}}
    if name in configs:
        sizes = {"fsdp_size": 2} if name != "tensors" else {}
        config = DistributedConfig(**sizes, **configs[name])
        dtype = torch.float64 if name in CLOSE else torch.float32
        return type(model()).from_pretrained(folder / "model", distributed_config=config, dtype=dtype).eval(), {}
    if name == "fully_shard":
        return shard(model()), {}
    if name == "micro-batches":
        return shard(model().double()), {"gradient_accumulation_steps": 2}
    return model(), FSDP


def trainer(made: nn.Module, case: str, folder: Path, **keywords) -> UnlearnTrainer:
    """A trainer of a case, whose ranks share out the batches of an epoch without a rest."""
    pairs = ForgetRetainDataset(examples(16, 1), examples(20, 2), seed=0)
    own = {"max_steps": 2, "save_strategy": "no"} | keywords
    settings = arguments(folder, **own)
    return UnlearnTrainer(made, settings, recipe(case, *CASES[case], lr=1e-2), pairs, eval_dataset=pairs)


def trained(made: nn.Module, case: str, folder: Path, **keywords) -> tuple[dict, dict]:
    """Weights after a run, and its losses with that of an evaluation."""
    run = trainer(made, case, folder, **keywords)
    run.train()
    found = [entry["forget_loss"] for entry in run.state.log_history if "forget_loss" in entry]
    evaluated = run.evaluate()["eval_loss"]
    named = run.unlearn_step.model.named_parameters()
    whole = {name: p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach() for name, p in named}
    return {name: p.clone() for name, p in whole.items()}, {"losses": found, "evaluated": evaluated}


def forced(self, *args, fsdp_plugin=None, **keywords) -> None:
    """Make accelerate take its plugin on CPUs too, where it ignores it."""
    _INIT(self, *args, fsdp_plugin=fsdp_plugin, **keywords)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


def flattening(self, *args, **keywords) -> None:
    """Make accelerate take FSDP1, of which it makes no plugin on CPUs."""
    forced(self, *args, **keywords)
    self.fsdp_plugin.fsdp_version = 1


def afresh() -> None:
    """Have accelerate forget what an earlier trainer of this process has asked for."""
    AcceleratorState._reset_state()
    os.environ.pop("ACCELERATE_USE_FSDP", None)


def message(made: nn.Module, folder: Path, **keywords) -> str:
    """Return what is said of a trainer that cannot be made."""
    deepspeed, init = keywords.pop("deepspeed", None), keywords.pop("init", forced)
    afresh()
    try:
        with mock.patch.object(AcceleratorState, "__init__", init):
            settings = arguments(folder, save_strategy="no", ddp_backend="gloo", **keywords)
            settings.deepspeed = deepspeed
            UnlearnTrainer(made, settings, "npo", ForgetRetainDataset(examples(4, 1), examples(4, 2), seed=0))
    except ValueError as error:
        return str(error)
    return "nothing"


def refused(folder: Path) -> dict:
    """Return what is said of engines that are not supported, and of one that accelerate silently leaves out."""
    found = {
        "tensors": message(engine("tensors", folder)[0], folder),
        "deepspeed": message(model(), folder, deepspeed={"zero_stage": 3}),
        "FSDP1": message(model(), folder, fsdp=True, init=flattening),
        "activations": message(model(), folder, fsdp=True, fsdp_config={"activation_checkpointing": True}),
    }
    afresh()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(model(), "npo", folder, ddp_backend="gloo", **FSDP)
    assert not run.is_fsdp_enabled
    found["left out"] = next((str(w.message) for w in caught if "FSDP was asked for" in str(w.message)), "nothing")
    return found


def found_by(rank: int, folder: Path) -> dict:
    """Train every case under every engine; return the losses and refusals."""
    if rank == 0:
        model().save_pretrained(folder / "model")
    distributed.barrier()
    found: dict = {}
    for name in (*BITWISE, *CLOSE):
        afresh()
        init = forced if name == "accelerate" else _INIT
        for case in CASES:
            with mock.patch.object(AcceleratorState, "__init__", init):
                made, asked = engine(name, folder)
                after, found[f"{name} {case}"] = trained(made, case, folder / "out", ddp_backend="gloo", **asked)
            if rank == 0:
                save_file(after, folder / f"{name} {case}.safetensors")
    found["refused"] = refused(folder)
    return found
