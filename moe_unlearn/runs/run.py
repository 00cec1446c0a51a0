"""One unlearning run put together: the model, the recipe and the data, for whoever plans it or makes its steps."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed, nn
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import TrainingArguments

from moe_unlearn import data, survive
from moe_unlearn.config import Recipe
from moe_unlearn.data import Example
from moe_unlearn.data.of_recipe import pair_collator
from moe_unlearn.data.pairs import carry_loss, side_batches
from moe_unlearn.lazy import each
from moe_unlearn.model import loading
from moe_unlearn.model.adapters import adapted
from moe_unlearn.model.batches import Batch, beside
from moe_unlearn.model.modes import checkpoint_activations, training_mode
from moe_unlearn.model.quantised import check_rounded
from moe_unlearn.plan import Mesh, Plan
from moe_unlearn.plan.advice import Unloaded
from moe_unlearn.plan.mesh import mesh_of
from moe_unlearn.prepare.stages import CHOOSING, needed
from moe_unlearn.ranks import everyone, gathered, sharded
from moe_unlearn.step import UnlearnStep
from moe_unlearn.trainer import UnlearnTrainer
from moe_unlearn.trainer.arguments import made as arguments_of
from moe_unlearn.trainer.lines import say_in_lines

SIDES = ("forget", "retain")
CHECKPOINTED = "checkpointing is on: the backward pass computes each layer's activations anew"


def room(device: torch.device) -> float:
    """Return the bytes that this process has on a GPU or may still take there; the CPU's are not counted."""
    if device.type != "cuda":
        return math.inf
    free, _ = torch.cuda.mem_get_info(device)
    return float(free + torch.cuda.memory_reserved(device))


def held(recipe: Recipe, sets: Mapping[str, Sequence[Example]]) -> Sequence[Example]:
    """Return the rows that a run holds: those drawn of "retain", and all of "earlier" and of "sampled"."""
    drawn = data.draw(sets["retain"], recipe.data.retain_rows, seed=recipe.seed)
    others = [*sets.get("earlier", ()), *sets.get("sampled", ())]
    return [*drawn, *others] if others else drawn


class Run:
    """A recipe on a model and sets of examples, put together once for whoever plans it or makes its steps.

    A recipe with an adapter puts it on the model (`model.adapters.adapted`), which is `model` of the run then.
    Of more examples than the recipe's `data.forget_rows` and `data.retain_rows`, that many are drawn.
    `sets` has "forget" and "retain", and perhaps "earlier", those of former requests (`data.earlier`), and "sampled",
    the model's own texts (`own_texts`), all of which join the retain rows, and "unseen", which the objective `level`
    steers by. Raises ValueError if the sets do not fit the recipe (see `pair_collator`), or if one carries no loss.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        recipe: Recipe,
        sets: Mapping[str, Sequence[Example]],
    ):
        self.model, self.tokenizer, self.recipe = adapted(model, recipe), tokenizer, recipe
        check_rounded(self.model, recipe)
        if recipe.survive is not None:
            survive.check_holdable(self.model)
        forget = data.draw(sets["forget"], recipe.data.forget_rows, seed=recipe.seed)
        retain, unseen = held(recipe, sets), sets.get("unseen")
        #: what the steps are made on, by side
        self.trained = {"forget": forget, "retain": retain} | ({} if unseen is None else {"unseen": unseen})
        self.pairs = data.ForgetRetainDataset(
            forget, retain, seed=recipe.seed, retain_per_forget=recipe.retain_per_forget
        )
        self.collator = pair_collator(recipe, tokenizer, forget, self.model, unseen)
        for side, examples in zip(SIDES, (forget, retain), strict=True):
            if not carry_loss(examples):
                raise ValueError(
                    f"the {side} set carries no loss: all its labels are -100: give texts longer than their prompts"
                )

    def batches(self, side: str) -> Sequence[Batch]:
        """Return one side in batches of the recipe's size on the model's device, every example once and in order.

        They are made when they are asked for.
        """
        made = side_batches(self.pairs, side, self.recipe.batch_size, self.collator)
        return each(made, lambda batch: beside(batch, self.model))

    def micro_batch(self, i: int) -> dict[str, Batch]:
        """Return both sides of micro-batch i on the model's device.

        The seed permutes the forget set, in a new order every epoch.
        """
        size = self.recipe.batch_size
        epoch, position = divmod(i, -(-len(self.pairs) // size))
        self.pairs.set_epoch(epoch)
        order = torch.randperm(len(self.pairs), generator=data.generator(self.pairs.seed, epoch)).tolist()
        made = self.collator([self.pairs[j] for j in order[position * size : (position + 1) * size]])
        return {side: beside(batch, self.model) for side, batch in made.items()}

    def plan(self, *, verify: int | bool = 0, mesh: Mesh | None = None, fits: Sequence[float] | None = None) -> Plan:
        """Plan the steps; the stages that choose experts or weights run first, since the costs depend on them.

        `mesh` and `fits` are those of `make_plan`.
        """
        checkpointed = self.checkpoint_activations()
        step = UnlearnStep(self.model, self.recipe, verify=verify, process_group=everyone())
        forget, retain = map(self.batches, SIDES)
        if not set(needed(self.recipe)).isdisjoint(CHOOSING):
            step.prepare(forget, retain, stages=CHOOSING)
        with training_mode(self.model) if checkpointed else nullcontext():
            made = step.plan(forget, retain, mesh=mesh, fits=fits, stored=True)
        if checkpointed:
            made.notes.append(CHECKPOINTED)
        return made

    def checkpoint_activations(self) -> bool:
        """Switch gradient checkpointing on as the recipe says, and return whether it is on; no number depends on it.

        With `auto` it is on under rounded weights, and if the plan of a step without it exceeds the `room` on the
        model's device, of several ranks on that of any: all decide the same. Weights that ranks share out are planned
        from the model's config; where that does not make the model, as with adapters, it stays off. Raises ValueError
        for a model that has no gradient checkpointing, if it is asked for.
        """
        on = self.recipe.recomputes
        device = next(self.model.parameters()).device
        if not on and self.recipe.checkpointing == "auto" and room(device) < math.inf:
            step = None if sharded(self.model) else UnlearnStep(self.model, self.recipe, process_group=everyone())
            _, short = gathered(lambda: self._peak(step) > room(device), bool)
            on = any(short)
            if step is not None:
                step.close()
        if on:
            checkpoint_activations(self.model)
        return on

    def _peak(self, step: UnlearnStep | None) -> int:
        """Plan the peak of a step, or without one that of sharded weights, 0 if these have no plan; no rank waits."""
        forget, retain = map(self.batches, SIDES)
        if step is not None:
            return step.plan(forget, retain, stored=True).peak
        try:
            build = loading.unloaded(self.model)
        except ValueError:
            return 0
        return Unloaded(build, UnlearnStep, ([*forget], [*retain]), mesh_of(self.model)).plan(self.recipe).peak

    def trainer(
        self,
        checkpoints: Path,
        *,
        cache_dir: Path | None = None,
        verify: int | bool = 0,
        held_out: Sequence[Example] = (),
    ) -> UnlearnTrainer:
        """Make the trainer of this run, which keeps its checkpoints in the folder `checkpoints`.

        Where the recipe's `trainer` section asks for evaluations, they are on the retain rows `held_out`, or on
        those of training if there are none or if the retain loss looks up what was prepared for a row.
        """
        recipe = self.recipe
        gloo = everyone() is not None and distributed.get_backend() == "gloo"
        device = next(self.model.parameters()).device
        arguments = arguments_of(
            _Arguments,
            recipe.trainer,
            model_device="" if everyone() is not None else str(device),
            output_dir=str(checkpoints),
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.batch_size,
            gradient_accumulation_steps=recipe.accumulate,
            learning_rate=recipe.optimizer.lr,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=recipe.optimizer.warmup_steps,
            max_grad_norm=recipe.optimizer.max_grad_norm or 0.0,
            logging_steps=1,
            save_strategy="steps",
            save_steps=max(1, recipe.steps // 5),
            save_total_limit=2,
            seed=recipe.seed,
            dataloader_pin_memory=torch.cuda.is_available(),  # torch warns about it where there is no GPU
            use_cpu=gloo or device.type == "cpu",  # without it accelerate takes CPUs for no ranks
            ddp_backend="gloo" if gloo else None,
            per_device_eval_batch_size=recipe.batch_size,
            run_name=recipe.name,
            report_to="none",
        )
        made = UnlearnTrainer(
            self.model,
            arguments,
            recipe,
            train_dataset=self.pairs,
            eval_dataset=None if arguments.eval_strategy == "no" else self._evaluated(held_out),
            data_collator=self.collator,
            cache_dir=cache_dir,
            verify=verify,
            processing_class=self.tokenizer,
        )
        say_in_lines(made)
        if arguments.model_device:
            made.accelerator.device_placement = False  # else accelerate moves the model to the first GPU
        return made

    def _evaluated(self, held_out: Sequence[Example]) -> data.ForgetRetainDataset:
        """Return the pairs that evaluations during training are of; see `trainer`."""
        recipe = self.recipe
        looked_up = recipe.retain.objective not in ("nll", "none") or recipe.trace is not None
        if looked_up or not held_out or (recipe.mollm is not None and recipe.mollm.kl):
            return self.pairs
        return data.ForgetRetainDataset(self.pairs.forget, held_out, seed=recipe.seed)


@dataclass
class _Arguments(TrainingArguments):
    """Arguments of a Trainer that leaves one process's model where it is.

    transformers' own move it to the first GPU, and replicate it on all there are.
    """

    model_device: str = ""  # "" leaves all to transformers, as ranks need it

    @property
    def device(self) -> torch.device:
        chosen = super().device  # which also sets accelerate up
        return torch.device(self.model_device) if self.model_device else chosen

    @property
    def n_gpu(self) -> int:
        count: int = super().n_gpu
        return min(count, 1) if self.model_device else count
