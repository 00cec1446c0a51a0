"""Two ranks with whole weights make unlearning steps together; each writes its weights."""

from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from moe_unlearn.data import ForgetRetainDataset
from moe_unlearn.model.digest import tensor_digest
from moe_unlearn.ops import gram
from moe_unlearn.ranks import RankError
from moe_unlearn.step import UnlearnStep, gradients
from moe_unlearn.step.objectives import Objectives
from moe_unlearn.trainer import UnlearnTrainer
from tests.support.models import tiny_olmoe
from tests.support.steps import VOCAB, changed, data, recipe, weights
from tests.support.training import arguments, combined, differing, examples

STEPS = 2
SGD = ["optimizer.name=sgd", "optimizer.momentum=0.9"]
CASES = {
    "graddiff": ["optimizer.max_grad_norm=0.5"],
    "npo": ["fused=false"],
    "pdu": ["retain.alpha=1.0", "dual.retain_loss_eps=3.0", "dual.warmup_steps=0"],
    "simnpo": ["router={mode: invariant, energy: 1, rank: 8}"],
    "trace": ["scope.kind=experts"],
    "wagle": ["wagle.keep=0.3"],
    "mollm": ["mollm.gradients=factors", "mollm.kl_floor=0"],
    "combined": ["sizes=true", "mollm.kl_floor=0"],
}


def made(name: str, *more: str):
    """The recipe of a case, and what it asks of the step itself."""
    asked = {line.partition("=")[0] for line in CASES[name]} & {"fused", "sizes"}
    own = [line for line in CASES[name] if line.partition("=")[0] not in asked]
    return recipe(name, *SGD, *own, *more, lr=1e-2), {"fused": "fused" not in asked}, "sizes" in asked


def model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return tiny_olmoe(VOCAB).eval()


def batches_of(i: int, rank: int) -> tuple[dict, dict]:
    """Return what a rank has in step `i`."""
    forget, retain = data()
    which = (2 * i + rank) % len(forget)
    pair = forget[which], retain[which]
    # ranks have tokens and rows of their own number
    return tuple({key: value[rank:] for key, value in batch.items()} for batch in pair)


def run(name: str, rank: int, folder: Path) -> tuple[dict, list[dict]]:
    """Weights and metrics after `STEPS` steps."""
    settings, options, sized = made(name)
    if name == "graddiff":
        step = UnlearnStep(DistributedDataParallel(model()), settings, **options)
    else:  # weights that differ become the first rank's
        step = UnlearnStep(model(rank), settings, process_group=distributed.group.WORLD, **options)
    step.prepare(*data(), cache_dir=folder / "cache")
    metrics = []
    for i in range(STEPS):
        pair = batches_of(i, rank)
        metrics.append(step(*pair, sizes=step.sizes([pair]) if sized else None))
    return weights(step.model), metrics


def trained(folder: Path, **keywords) -> tuple[dict, dict]:
    """Weights and losses of a Trainer's run, and in which weights one differs that is resumed half-way."""
    dataset = ForgetRetainDataset(examples(16, 1), examples(20, 2), seed=0)  # whole batches alone

    def trainer() -> UnlearnTrainer:
        settings = arguments(folder, max_steps=4, **keywords)
        return UnlearnTrainer(model(), settings, combined("mollm.gradients=compact"), dataset)

    whole, again = trainer(), trainer()
    whole.train()
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    losses = [entry["forget_loss"] for entry in whole.state.log_history if "forget_loss" in entry]
    return weights(whole.model), {"losses": losses, "differing": differing(again.model, whole.model)}


class NotFinite(Objectives):
    """Losses that are all NaN."""

    def __call__(self, *args, **options):
        return {name: value * float("nan") for name, value in super().__call__(*args, **options).items()}


def refused(rank: int) -> list[str]:
    """Return the errors that end both ranks, though only one of them may have cause to; no weight moves."""
    errors = []

    def attempt(act):
        step = UnlearnStep(DistributedDataParallel(model()), recipe("graddiff"))
        before = weights(step.model)
        try:
            act(step)
        except (ValueError, ArithmeticError) as error:
            errors.append(f"{type(error).__name__}: {error}")
        assert not changed(step.model, before)

    def bad_loss(step):
        step.objectives.__class__ = NotFinite if rank else Objectives
        step(*batches_of(0, rank))

    def bad_gradient(step):
        if rank:
            step.model.model.norm.weight.register_hook(lambda g: g * float("inf"))
        step(*batches_of(0, rank))

    def flattened(step):
        UnlearnStep(FullyShardedDataParallel(model(), device_id=torch.device("cpu")), recipe("graddiff"))

    attempt(bad_loss)
    attempt(bad_gradient)
    attempt(lambda step: step.prepare(*(side[rank:] for side in data())))
    attempt(flattened)
    return errors


def without_a_folder(rank: int, folder: Path) -> str:
    """The error of a preparation whose cache one rank cannot make."""
    taken = folder / "taken"
    taken.write_text("", encoding="utf-8")
    step = UnlearnStep(DistributedDataParallel(model()), recipe("npo"))
    try:
        step.prepare(*data(), cache_dir=taken if rank else folder / "cache")
    except (OSError, RankError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("expected an error")


def elsewhere(rank: int) -> dict[str, str]:
    """A digest of the weights after a step in which the second rank rounds inner products otherwise, by recipe."""
    found = {}

    def rounded(*arguments, **keywords):
        products = gram(*arguments, **keywords)
        return products * (1 + 1e-4 * rank * torch.eye(len(products)))

    for name in ("graddiff", "mollm"):
        step = UnlearnStep(model(), made(name)[0], process_group=distributed.group.WORLD)
        step.prepare(*data())
        with mock.patch.object(gradients, "gram", rounded):
            step(*batches_of(0, rank))
        found[name] = "".join(map(tensor_digest, weights(step.model).values()))
    return found


def found_by(rank: int, folder: Path) -> dict:
    """Make every step; return the metrics, and the errors that were met."""
    found = {}
    for name in CASES:
        after, found[name] = run(name, rank, folder)
        save_file(after, folder / f"{name}-{rank}.safetensors")
    after, found["trainer"] = trained(folder / "trainer", ddp_backend="gloo")
    save_file(after, folder / f"trainer-{rank}.safetensors")
    found["errors"], found["elsewhere"] = refused(rank), elsewhere(rank)
    found["cache"] = without_a_folder(rank, folder)
    return found
