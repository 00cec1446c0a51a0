"""UnlearnTrainer, which runs the unlearning step inside transformers' Trainer.

The recipe decides what is optimised and how (objectives, levers, scope, optimizer and its learning rate);
`TrainingArguments` decide the loop (steps, batch size, accumulation, schedule, clipping, logging, saving). What one of
them is told and the other decides is named in a warning.
The Trainer provides everything else: callbacks, `report_to`, evaluation, checkpoints.

Its checkpoints are whole (`checkpoints`), and a resume goes on from the newest one that is, with the same bits. A
resume of a run that is at its end trains no more. All trained weights are finite at every checkpoint, and every
`CHECKED` steps, or the run ends and the newest checkpoint is restored.

Of a model whose weights ranks share out (`sharding`) every rank trains its part. Weights may be shared out before the
Trainer gets the model, by torch's `fully_shard` or transformers' `DistributedConfig`, or by accelerate's FSDP2 when
training begins; then the step takes up the parts and prepares with them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from moe_unlearn.config import Recipe
from moe_unlearn.data.of_recipe import pair_collator, paired
from moe_unlearn.data.pairs import side_batches
from moe_unlearn.lazy import each
from moe_unlearn.model.saving import check_savable
from moe_unlearn.ranks import everyone
from moe_unlearn.sharding.launched import asked_of_accelerate, check_accelerate, check_deepspeed, each_batch_synced
from moe_unlearn.step import UnlearnStep
from moe_unlearn.step.evaluated import evaluated
from moe_unlearn.trainer.arguments import warn_of_conflicts
from moe_unlearn.trainer.checkpoints import CheckpointedTrainer

#: steps after which all trained weights are looked at; that reads them once
CHECKED = 100


class UnlearnTrainer(CheckpointedTrainer):
    """A `transformers.Trainer` whose step unlearns.

    Args:
        model: the causal LM to change, already loaded.
        args: TrainingArguments; `remove_unused_columns` is switched off, which nested batches need.
        recipe: a `Recipe`, a mapping of its keys, a YAML path or the name of a shipped recipe.
        train_dataset: a `data.ForgetRetainDataset`, or any dataset with lists `forget` and `retain` of
            examples and items `{"forget": [(example, index)], "retain": [(example, index), ...]}`; or a mapping
            (`datasets.DatasetDict`) of the two to rows, which `processing_class` encodes as recipe.data says.
        data_collator: makes `{"forget": batch, "retain": batch}` from a list of such items; by default a
            `data.PairCollator`.
        cache_dir: folder that keeps references from run to run; see `UnlearnStep.prepare`.
        verify: how many steps to compare with the plain path, as in `UnlearnStep`.

    Further keywords go to `Trainer`, except `optimizers`, which the recipe determines. Several processes (`torchrun`)
    are ranks, each with all weights (see `ranks`), or with parts of them under FSDP2 or expert parallelism: of a model
    that is sharded already, or by `fsdp` in `args` or in accelerate's configuration. Warns where that asks for FSDP and
    accelerate does not provide it, as on CPUs. Raises ValueError for fp16 (its loss scaling would need gradients
    twice), for weights shared out by FSDP1, DeepSpeed or tensor parallelism, and for accelerate's own checkpointing of
    activations, which renames parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        recipe: Recipe | Mapping | str | Path,
        train_dataset: Dataset | Mapping | None,
        data_collator: Callable[[list], dict[str, Any]] | None = None,
        cache_dir: str | Path | None = None,
        verify: int | bool = 0,
        **keywords: Any,
    ):
        if "optimizers" in keywords or "optimizer_cls_and_kwargs" in keywords:
            raise ValueError("the recipe's optimizer section makes the optimizer; pass no other")
        if args.fp16:
            raise ValueError("fp16 needs loss scaling, which is not supported; use bf16")
        ranks = everyone()
        if ranks is not None and args.world_size == 1:
            raise ValueError(
                "TrainingArguments found one process, though torch.distributed has more: on CPUs give it use_cpu=True "
                "and ddp_backend='gloo'"
            )
        check_deepspeed(args.deepspeed or asked_of_accelerate("DEEPSPEED"))
        if isinstance(train_dataset, Mapping):
            recipe = Recipe.of(recipe)
            train_dataset = paired(train_dataset, recipe, keywords.get("processing_class"))
        sides = {side: getattr(train_dataset, side, ()) for side in ("forget", "retain")}
        for side, examples in sides.items():
            if not len(examples):
                raise ValueError(f"train_dataset must have a non-empty list of examples {side!r}")
        args.remove_unused_columns = False
        self.unlearn_step = UnlearnStep(model, recipe, verify=verify, process_group=ranks)
        warn_of_conflicts(args, self.unlearn_step.recipe)
        self.unlearn_step.micro_batches = args.gradient_accumulation_steps
        if args.max_grad_norm:
            self.unlearn_step.held_back = "TrainingArguments.max_grad_norm clips (0 does not)"
        self._cache_dir = cache_dir
        if data_collator is None:
            tokenizer = keywords.get("processing_class")
            data_collator = pair_collator(
                self.unlearn_step.recipe, tokenizer, sides["forget"], model, getattr(train_dataset, "unseen", None)
            )
        self._logged: dict[str, list[float]] = {}
        self._sides: dict[str, list[torch.Tensor]] = {}  # of an evaluation: its losses by name
        self._sizes: dict[str, int] | None = None  # the sizes of the global batch in progress
        # of a model that transformers has shared out the Trainer saves weights only, and refuses anything else
        only_model = args.save_only_model
        args.save_only_model |= self.unlearn_step.ranks.sharded
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=data_collator,
            **keywords,
        )
        args.save_only_model = only_model
        # not an argument: the Trainer takes none under FSDP, where accelerate exchanges its parameters
        self.optimizer = self.unlearn_step.optimizer
        self._check_engine()
        if ranks is not None and not self.is_fsdp_enabled:
            # the step adds up gradients itself, and DistributedDataParallel would hold a gradient for every weight
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.add_callback(_Bookkeeping(self, train_dataset))
        self.unlearn_step.restore = self._restore

    def _check_engine(self) -> None:
        """Raise ValueError for an engine of accelerate that is not supported, or a model that it could not save."""
        check_deepspeed(self.is_deepspeed_enabled)
        check_accelerate(self.accelerator, self.args.fsdp, ranks=everyone() is not None, sharded=self._sharded)
        if (self._sharded or self.is_fsdp_enabled) and self.args.save_strategy != "no":
            check_savable(self.unlearn_step.model)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Prepare on the unchanged model, or restore the checkpoint's preparation, then train.

        `resume_from_checkpoint` is a checkpoint's folder, or True for the newest whole one in `output_dir`: others are
        skipped with a warning, and stay. If no step is left, the model gets the checkpoint's weights, and that is said.
        Raises ValueError if a checkpoint was prepared on other rows than those of the dataset, and CheckpointError
        for one that differs from what was written.
        """
        checkpoint = self.checkpoint_of(resume_from_checkpoint)
        if checkpoint is not None:
            self._load_step(checkpoint)
            if (ended := self._ended(checkpoint)) is not None:
                self._correct_routers()
                return ended
        if not self.is_fsdp_enabled:
            self.prepare()
        with each_batch_synced(self.accelerator, wanted=everyone() is not None):
            trained = super().train(
                resume_from_checkpoint=None if checkpoint is None else str(checkpoint),
                trial=trial,
                ignore_keys_for_eval=ignore_keys_for_eval,
            )
        self._correct_routers()
        return trained

    def _correct_routers(self) -> None:
        """Correct the routers once after the last step, if the recipe says so; checkpoints have them from before."""
        if self.unlearn_step.recipe.router.correct:
            self.prepare()
            self.log(self.unlearn_step.correct_routers())

    def _take_up(self) -> None:
        """Have the step take up the parts of weights that accelerate has made when training begins, and prepare."""
        if self.is_fsdp_enabled:
            self.unlearn_step.rebind()
            self.prepare()

    def prepare(self) -> None:
        """Run `UnlearnStep.prepare` on all forget and retain examples of the dataset."""
        size = self.args.per_device_train_batch_size

        def batches(side: str) -> Sequence:
            made = side_batches(self.train_dataset, side, size, self.data_collator, self._item)
            return each(made, lambda batch: self._prepare_inputs({side: batch})[side])

        self.unlearn_step.prepare(batches("forget"), batches("retain"), cache_dir=self._cache_dir)

    def _item(self, side: str, index: int) -> object:
        """Return what an item of the dataset holds for row `index` of one side."""
        return [(getattr(self.train_dataset, side)[index], index)]

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """Return the micro-batches of the next step, and count the units of its losses on all ranks."""
        step, draw = self.unlearn_step, super().get_batch_samples
        samples: list = []

        def drawn() -> tuple[torch.Tensor | int | None, bool]:
            own, items = draw(epoch_iterator, num_batches, device)
            if any(side not in batch for batch in own for side in ("forget", "retain")):
                raise ValueError('expected batches {"forget": rows, "retain": rows}, as `data.PairCollator` makes them')
            samples.extend(own)
            return items, True

        items, _ = step.ranks.together(drawn, lambda: {"the number of micro-batches": len(samples)})
        self._sizes = None
        if len(samples) > 1:  # the step itself counts a single micro-batch
            prepared: Iterator[dict[str, Any]] = (self._prepare_inputs(batch) for batch in samples)
            self._sizes = step.sizes((batch["forget"], batch["retain"]) for batch in prepared)
        return samples, items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Accumulate one micro-batch; after a step's last one, combine its gradient for the optimizer.

        Returns the weighted sum of the step's losses after the last micro-batch, as `prediction_step` weighs those of
        a pair, and 0 before. The Trainer logs it as "loss".
        """
        model.train()
        inputs, step = self._prepare_inputs(inputs), self.unlearn_step
        last = self.accelerator.sync_gradients
        # accelerate applies mixed precision by wrapping the model's forward, which the step does not call
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            step.accumulate(inputs["forget"], inputs["retain"], sizes=self._sizes, last=last)
        if not last:
            return torch.zeros((), device=self.args.device)
        metrics = step.combine()
        if step.done:
            self.control.should_training_stop = True
        self._log_metrics(metrics)
        losses = {name.removesuffix("_loss"): value for name, value in step.tally.losses().items()}
        return torch.tensor(step.objectives.weighed(losses), device=self.args.device)

    def _finish_step(self) -> None:
        """Finish the step whose update the optimizer has made."""
        self._log_metrics(self.unlearn_step.finish())
        if self.unlearn_step.steps % CHECKED == 0:
            self.check_weights()

    def _log_metrics(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._logged.setdefault(name, []).append(value)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Return the weighted sum of a pair's objectives, as in a step without MOLLM; other batches as usual."""
        with torch.no_grad(), self.compute_loss_context_manager(), self.accelerator.autocast():
            losses = evaluated(self.unlearn_step, self._prepare_inputs(inputs))
        if losses is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        loss = self.unlearn_step.objectives.weighed(losses)
        assert isinstance(loss, torch.Tensor)
        for name, value in losses.items():  # once for each row, as the Trainer counts the loss of a batch
            rows = value.detach().repeat(len(inputs["forget"]["input_ids"]))
            self._sides.setdefault(name, []).append(self.accelerator.gather_for_metrics(rows))
        return loss, None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as transformers does, and add the mean of each loss of pairs, such as `eval_forget_loss`."""
        self._sides.clear()
        given = (dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        output = super().evaluation_loop(*given)
        means = {name: torch.cat(parts).mean().item() for name, parts in self._sides.items()}
        assert output.metrics is not None
        output.metrics.update({f"{metric_key_prefix}_{name}_loss": mean for name, mean in means.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the means of the step's metrics since the last log added."""
        if "loss" in logs and self._logged:
            logs = logs | {name: sum(v) / len(v) for name, v in self._logged.items() if name not in logs}
            self._logged.clear()
        super().log(logs, start_time)

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """Leave the gradients of adapters beside sharded weights as they are: the step adds them up itself."""

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        return torch.tensor(self.unlearn_step.clip(self.args.max_grad_norm))


class _Bookkeeping(TrainerCallback):
    """Callback that tells the step of the beginning and of each update of the optimizer, the dataset of each epoch."""

    def __init__(self, trainer: UnlearnTrainer, dataset: object):
        self.trainer, self.dataset = trainer, dataset

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        self.trainer._take_up()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        # accelerate forwards the epoch to the dataset, but not after a resume in the middle of one
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(int(state.epoch or 0))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        self.trainer._finish_step()
