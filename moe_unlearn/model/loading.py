"""Loads models and tokenizers from folders, never from a hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from moe_unlearn.config import geometry, models
from moe_unlearn.sharding import check_versions


def model_folder(folder: str | Path) -> Path:
    """Return `folder` as a path; ValueError unless a config.json is in it."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise ValueError(f"expected a model folder written by save_pretrained; {folder} {what}")
    return folder


def load_model(folder: str | Path, *, fsdp: int = 1, ep: int = 1) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and the tokenizer of a folder written by `save_pretrained`.

    With `fsdp` above 1 that many ranks, which are all there are, share the weights out, as DistributedConfig of
    transformers does, and groups of `ep` of them the experts. Raises ValueError, naming the folder and what it lacks.
    """
    options = {}
    if fsdp > 1:
        check_versions()
        # imported here because earlier versions of transformers have it otherwise or not at all
        from transformers.distributed.configuration_utils import DistributedConfig

        options["distributed_config"] = DistributedConfig(fsdp_size=fsdp, ep_size=ep)
    model, tokenizer, _ = _load(folder, AutoModelForCausalLM, "causal language model", **options)
    return model, tokenizer


def sharing_of(model: nn.Module) -> dict[str, int]:
    """Return how `load_model` shared a model's weights out: its options `fsdp` and `ep`, none for whole weights."""
    config: Any = getattr(getattr(model, "config", None), "distributed_config", None)
    return {} if config is None else {"fsdp": config.fsdp_size or 1, "ep": config.ep_size or 1}


def load_classifier(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and the tokenizer of a sequence classifier (Toxic-BERT) in a folder; errors as `load_model`."""
    model, tokenizer, missing = _load(folder, AutoModelForSequenceClassification, "sequence classifier")
    if missing:  # transformers fills them with random numbers
        raise ValueError(f"expected a sequence classifier in {folder}; it has no weights {', '.join(sorted(missing))}")
    return model, tokenizer


def _load(
    folder: str | Path, kind: Any, name: str, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, set[str]]:
    """Load a model and its tokenizer; return them and the names of the weights that the folder lacks."""
    folder = model_folder(folder)
    try:
        with no_loading_bars():
            own = {"local_files_only": True, "dtype": "auto", "output_loading_info": True}
            model, info = kind.from_pretrained(folder, **own, **options)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and safetensors raise many kinds for a damaged folder
        why = str(error).strip().partition("\n")[0]  # the further lines list every model that transformers knows
        raise ValueError(f"cannot load a {name} with its tokenizer from {folder}: {why}") from error
    return model.eval(), tokenizer, info["missing_keys"]


def meta_model(source: str | Path) -> nn.Module:
    """Build a causal LM without storage, on the meta device, in the dtype of its config.

    `source` is a name in `models()`, a folder with a config.json, or the path of such a file. Raises ValueError for
    anything else.
    """
    if source in models():
        made = AutoConfig.for_model(**geometry(source))
    elif Path(source).exists():
        try:
            made = AutoConfig.from_pretrained(source, local_files_only=True)
        except Exception as error:  # transformers raises many kinds for a damaged file
            raise ValueError(f"cannot read a model's config from {source}: {error}") from error
    else:
        raise ValueError(f"no model {str(source)!r}: a folder, a config.json or one of {', '.join(models())}")
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(made, dtype=made.dtype)
    return model


@contextmanager
def no_loading_bars() -> Iterator[None]:
    # transformers draws loading bars for models of any size, and into log files too
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
