"""One unlearning run on a user's data, from the recipe to the folder of results."""

import json
import time
from pathlib import Path

import torch
from torch import nn
from transformers import TrainingArguments

from moe_unlearn import data, metrics, trace
from moe_unlearn.config import Recipe
from moe_unlearn.model import loading
from moe_unlearn.runs import report
from moe_unlearn.step import UnlearnStep
from moe_unlearn.trainer import UnlearnTrainer


def unlearn(
    model: nn.Module,
    tokenizer,
    recipe: Recipe,
    sets: dict[str, list],
    out: Path,
    *,
    resume: bool = False,
    evaluate: bool = True,
    cache_dir: Path | None = None,
    verify: int | bool = 0,
    reports: dict[str, data.DataReport] | None = None,
) -> dict:
    """Run `recipe` on `sets` ("forget", "retain" and perhaps "holdout" examples) and write the folder `out`.

    `out` gets `recipe.yaml`, `checkpoints/`, `model/` (which `from_pretrained` loads), `summary.json`,
    `trajectory.json` and `report.md`; with `reports` (by side) also `data.json`, with `verify` (as in `UnlearnStep`)
    `verified.txt`, and with TRACE `routing.json`. Preparation comes first, so that nothing is written if the recipe
    does not fit model or data. With `resume` the run continues from the newest checkpoint. References are kept in
    `cache_dir`, by default `out/cache`. Returns the summary: run name -> metrics, empty without `evaluate`.
    """
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
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
        report_to="none",
    )
    if arguments.world_size > 1:
        raise ValueError(f"one process writes a run's folder; got {arguments.world_size}: for these use UnlearnTrainer")
    dataset = data.ForgetRetainDataset(
        sets["forget"], sets["retain"], seed=recipe.seed, retain_per_forget=recipe.retain_per_forget
    )
    trainer = UnlearnTrainer(
        model, arguments, recipe, dataset, processing_class=tokenizer, cache_dir=cache_dir or out / "cache",
        verify=verify,
    )  # fmt: skip
    start = time.perf_counter()
    if not resume:
        trainer.prepare()
    seconds = time.perf_counter() - start
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    if reports is not None:
        _write_json(out / "data.json", {side: own.to_dict() for side, own in reports.items()})
    summary = {}
    reference = None
    if evaluate:
        if recipe.data.reference is not None:
            retrained, _ = loading.load_model(recipe.data.reference)
            summary["retrain"] = metrics.evaluate(retrained, tokenizer, **sets)
            reference = summary["retrain"].get("minkauc")
        summary["target"] = metrics.evaluate(model, tokenizer, **sets, reference_auc=reference)
    start = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        if verify:
            (out / "verified.txt").write_text(trainer.unlearn_step.verifier.summary() + "\n", encoding="utf-8")
    seconds += time.perf_counter() - start
    # save_model would also write a pickle of the training arguments beside the weights
    trainer.model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    trajectory = [entry for entry in trainer.state.log_history if "forget_loss" in entry]
    _write_json(out / "trajectory.json", {recipe.name: trajectory})
    if routing := routing_of(trainer.unlearn_step):
        _write_json(out / "routing.json", {key: report.as_list(table) for key, table in routing.items()})
    if evaluate:
        after = metrics.evaluate(trainer.model, tokenizer, **sets, reference_auc=reference)
        summary[recipe.name] = after | {"seconds": seconds}
        _write_json(out / "summary.json", summary)
        report.write(out)
    return summary


def routing_of(step: UnlearnStep) -> dict:
    """Return the frequencies TRACE measured and the experts it chose, as `report` reads them; empty without TRACE."""
    recipe, prepared = step.recipe.trace, step.prepared
    if prepared.frequencies is None:
        return {}
    routing = {side: counted.frequency for side, counted in prepared.frequencies.items()}
    routing["selected"] = prepared.selected
    if prepared.inactive:
        routing["inactive"] = trace.why_empty(
            **prepared.frequencies, min_ratio=recipe.min_ratio, min_load=recipe.min_load
        )
    return routing


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
