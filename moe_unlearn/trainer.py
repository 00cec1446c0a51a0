"""UnlearnTrainer, which runs the unlearning step inside transformers' Trainer.

The recipe decides what is optimised and how (objectives, levers, scope, optimizer and its learning rate);
`TrainingArguments` decide the loop (steps, batch size, accumulation, schedule, clipping, logging, saving).
The Trainer provides everything else: callbacks, `report_to`, evaluation, checkpoints.

transformers saves a Mixture-of-Experts checkpoint with one key per expert and, on resume, loads it without
converting back, so that the fused expert weights keep their initial values (transformers issue 48805). This class
resumes through `from_pretrained` instead, and saves the step's own state (selection, weights, masks, caches) beside
the model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint

from moe_unlearn.checkpoint import load_state, save_state
from moe_unlearn.config import NEED_REFUSALS, Recipe
from moe_unlearn.data import (
    Example,
    ForgetRetainDataset,
    PairCollator,
    alternates,
    check_apart,
    check_rows,
    draw,
    encode_side,
    pad_token_id,
    refusals,
)
from moe_unlearn.data.pairs import side_batches
from moe_unlearn.model.batches import checked
from moe_unlearn.ranks import everyone
from moe_unlearn.step import UnlearnStep

_STATE = "unlearn_step"


def pair_collator(recipe: Recipe, tokenizer: Tokenizer | None, forget: Sequence[Example]) -> PairCollator:
    """Make the collator for pairs of `forget` examples, with refusals or alternates where the objective needs them.

    Raises ValueError if refusals need a `tokenizer` and there is none, or if an example has no prompt to refuse or no
    alternate.
    """
    pad_id = 0 if tokenizer is None else pad_token_id(tokenizer)
    if recipe.forget.objective not in NEED_REFUSALS:
        return PairCollator(pad_id)
    if recipe.forget.replacement == "alternate":
        return PairCollator(pad_id, alternates(forget))
    if tokenizer is None:
        raise ValueError(
            f"forget.objective {recipe.forget.objective!r} needs processing_class, a tokenizer, for its refusals"
        )
    return PairCollator(pad_id, refusals(forget, tokenizer, seed=recipe.seed))


def _paired(rows: Mapping, recipe: Recipe, tokenizer: Tokenizer | None) -> ForgetRetainDataset:
    """Return the pairs of two sets of rows, encoded and drawn as the recipe's data section says."""
    settings, sides = recipe.data, {}
    if rows.keys() != {"forget", "retain"}:
        raise ValueError(f"expected train_dataset to have forget and retain; got {', '.join(map(str, rows)) or 'none'}")
    if tokenizer is None:
        raise ValueError("rows need processing_class, a tokenizer, to be encoded")
    for side, own in rows.items():
        check_rows(side, own)
        replaced = recipe.forget.replacement == "alternate"
        sides[side] = encode_side(own, tokenizer, settings, side=side, alternates=replaced)
    check_apart(**sides)
    forget = draw(sides["forget"], settings.forget_rows, seed=recipe.seed)
    retain = draw(sides["retain"], settings.retain_rows, seed=recipe.seed)
    return ForgetRetainDataset(forget, retain, seed=recipe.seed, retain_per_forget=recipe.retain_per_forget)


class UnlearnTrainer(Trainer):
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
    are ranks, each with all weights; see `ranks`. Raises ValueError for fp16 (its loss scaling would need gradients
    twice), and for FSDP and DeepSpeed over several processes.
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
        if ranks is not None and (args.fsdp or args.deepspeed):
            raise ValueError("FSDP and DeepSpeed share weights out; every rank of UnlearnTrainer needs all of them")
        if isinstance(train_dataset, Mapping):
            recipe = Recipe.of(recipe)
            train_dataset = _paired(train_dataset, recipe, keywords.get("processing_class"))
        sides = {side: getattr(train_dataset, side, ()) for side in ("forget", "retain")}
        for side, examples in sides.items():
            if not len(examples):
                raise ValueError(f"train_dataset must have a non-empty list of examples {side!r}")
        args.remove_unused_columns = False
        self.unlearn_step = UnlearnStep(model, recipe, verify=verify, process_group=ranks)
        self.unlearn_step.micro_batches = args.gradient_accumulation_steps
        if args.max_grad_norm:
            self.unlearn_step.held_back = "TrainingArguments.max_grad_norm clips (0 does not)"
        self._cache_dir = cache_dir
        if data_collator is None:
            data_collator = pair_collator(self.unlearn_step.recipe, keywords.get("processing_class"), sides["forget"])
        self._logged: dict[str, list[float]] = {}
        self._sizes: dict[str, int] | None = None  # the sizes of the global batch in progress
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=data_collator,
            optimizers=(self.unlearn_step.optimizer, None),
            **keywords,
        )
        if ranks is not None:
            # the step adds up gradients itself, and DistributedDataParallel would hold a gradient for every weight
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.add_callback(_Bookkeeping(self.unlearn_step, train_dataset, self._log_metrics))
        self.unlearn_step.restore = self._restore

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Prepare on the unchanged model, or restore the checkpoint's preparation, then train.

        Raises ValueError if a checkpoint was prepared on other rows than those of the dataset.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"no checkpoint to resume in {self.args.output_dir!r}")
        if resume_from_checkpoint:
            self._load_step(str(resume_from_checkpoint))
        self.prepare()
        return super().train(
            resume_from_checkpoint=resume_from_checkpoint or None,
            trial=trial,
            ignore_keys_for_eval=ignore_keys_for_eval,
        )

    def prepare(self) -> None:
        """Run `UnlearnStep.prepare` on all forget and retain examples of the dataset."""
        size = self.args.per_device_train_batch_size

        def batches(side: str) -> list:
            made = side_batches(self.train_dataset, side, size, self.data_collator, self._item)
            return [self._prepare_inputs({side: batch})[side] for batch in made]

        self.unlearn_step.prepare(batches("forget"), batches("retain"), cache_dir=self._cache_dir)

    def _item(self, side: str, index: int) -> object:
        """Return what an item of the dataset holds for row `index` of one side."""
        return [(getattr(self.train_dataset, side)[index], index)]

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """Return the micro-batches of the next step, and count the units of its losses on all ranks."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._sizes = None
        if len(samples) > 1:  # the step itself counts a single micro-batch
            prepared: list[dict[str, Any]] = [self._prepare_inputs(batch) for batch in samples]
            self._sizes = self.unlearn_step.sizes((batch["forget"], batch["retain"]) for batch in prepared)
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

    def _log_metrics(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._logged.setdefault(name, []).append(value)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Return the weighted sum of a pair's objectives, as in a step without MOLLM; other batches as usual."""
        if "forget" not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        objectives = self.unlearn_step.objectives
        with torch.no_grad(), self.compute_loss_context_manager(), self.accelerator.autocast():
            forget, retain = (checked(inputs[side], side) for side in ("forget", "retain"))
            values = {**objectives.forget(forget), **objectives.retain(retain)}
        loss = objectives.weighed(values)
        assert isinstance(loss, torch.Tensor)
        return loss, None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the means of the step's metrics since the last log added."""
        if "loss" in logs and self._logged:
            logs = logs | {name: sum(v) / len(v) for name, v in self._logged.items() if name not in logs}
            self._logged.clear()
        super().log(logs, start_time)

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        return torch.tensor(self.unlearn_step.clip(self.args.max_grad_norm))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            state = self.unlearn_step.state_dict()
            del state["optimizer"]  # the Trainer saves it
            save_state(folder, _STATE, state)
        super()._save_checkpoint(model, trial)

    def _load_step(self, checkpoint: str) -> None:
        """Restore the state of the step that a checkpoint holds."""
        state = load_state(Path(checkpoint), _STATE)
        assert isinstance(state, dict)
        self.unlearn_step.load_state_dict(state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        own: Any = self.model if model is None else model
        if hasattr(own, "peft_config") or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, own)
        dtypes = {p.dtype for p in own.parameters()}
        # float32 holds every narrower value exactly; a model of one dtype is loaded in that dtype
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        saved = type(own).from_pretrained(resume_from_checkpoint, dtype=dtype)
        own.load_state_dict(saved.state_dict(), strict=True)

    def _restore(self) -> str:
        """Restore the newest checkpoint after a step that stopped with some weights updated; return what was done."""
        folder = Path(str(self.args.output_dir))
        checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
        if checkpoint is None:
            return "there is no checkpoint to restore"
        self._load_from_checkpoint(checkpoint)
        self._load_step(checkpoint)
        self._load_optimizer_and_scheduler(checkpoint)
        return f"{Path(checkpoint).name} was restored"

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if hasattr(self.model, "peft_config") or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        elif best is not None:
            self._load_from_checkpoint(best)


class _Bookkeeping(TrainerCallback):
    """Callback that tells the dataset of each epoch, and the step of each update of the optimizer."""

    def __init__(self, step: UnlearnStep, dataset: object, log: Callable[[dict[str, float]], None]):
        self.step, self.dataset, self.log = step, dataset, log

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        # accelerate forwards the epoch to the dataset, but not after a resume in the middle of one
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(int(state.epoch or 0))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        self.log(self.step.finish())
