"""Run lm-evaluation-harness on a model in memory (extra `eval`), with tasks from local files where there is no hub."""

import json
from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from moe_unlearn.data import MissingLibraryError
from moe_unlearn.files import write_text
from moe_unlearn.metrics.answers import fields
from moe_unlearn.metrics.choices import DESCRIPTION, SUBJECTS
from moe_unlearn.model.modes import evaluation_mode
from moe_unlearn.ranks import local


def harness(
    model: nn.Module,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> dict[str, float]:
    """Return what lm-eval reports on `tasks`, as `TASK/METRIC` (`wmdp_bio/acc`, `mmlu/acc`), without standard errors.

    `include_path` is a folder of task files, e.g. by `write_task`; other tasks may need the hub. The model is
    left as found. Raises MissingLibraryError without lm-eval, ValueError for unknown tasks.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingLibraryError("the harness needs lm-eval: pip install moe-unlearn[eval]") from error
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ValueError(f"lm-eval knows no task {unknown[0]!r}; include_path is {include_path}")
    plain = local(model)
    with evaluation_mode(plain):
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=plain, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )
    return {
        f"{task}/{name.split(',')[0]}": float(value)
        for task, values in found["results"].items()
        for name, value in values.items()
        if "," in name and "_stderr" not in name and isinstance(value, int | float)
    }


def write_task(folder: str | Path, name: str, rows: Sequence, subject: str | None = None) -> Path:
    """Write rows (`question`, `choices`, `answer`) as a task that lm-eval finds with `include_path=folder`.

    Writes two files, NAME.jsonl and NAME.yaml; the latter has the form of the harness's own WMDP and MMLU tasks.
    `subject` defaults to the WMDP task's own. Returns the path of the .yaml. If lm-eval already knows a task of this
    name, it is unclear which one runs; a unique name avoids this.
    """
    subject = subject or SUBJECTS.get(name)
    if subject is None:
        raise ValueError(f"task {name!r} needs a subject; only those of {', '.join(SUBJECTS)} are known")
    folder = Path(folder).resolve()
    checked = fields(rows, ("question", "choices", "answer"), name)
    counts = sorted({len(row["choices"]) for row in checked})
    if len(counts) > 1 or not 2 <= counts[0] <= 26:
        raise ValueError(f"{name}: expected the same number of choices, 2 to 26, in every row; got {counts}")
    letters = [chr(ord("A") + i) for i in range(counts[0])]
    shown = "".join(f"\n{letter}. {{{{choices[{i}]}}}}" for i, letter in enumerate(letters))
    write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in checked))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "description": DESCRIPTION.format(subject=subject),
        "doc_to_text": "{{question.strip()}}" + shown + "\nAnswer:",
        "doc_to_choice": letters,
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    # JSON is valid YAML
    write_text(folder / f"{name}.yaml", json.dumps(task, indent=1) + "\n")
    return folder / f"{name}.yaml"
