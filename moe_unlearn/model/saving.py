"""Saves a model as transformers does, from one process or from ranks that share its weights out, in little memory.

    save_pretrained(model, folder, tokenizer)        # every rank; the first one writes, and its error ends all
    save_model(model, folder, tokenizer)             # also models that the former refuses, by transformers

The folder has what `model.save_pretrained` writes: weights under the names of the hub, expert by expert where the
model's family has them so, in files of at most `max_shard_size` and their index. The weights are gathered, converted
and written one at a time, so that beside the shards no more than one whole weight is in memory, on one process no more
than one expert of it, and the files take their places when all are on the disk. Of a PeftModel these are
`adapter_model.safetensors` and `adapter_config.json`, of which all weights are gathered together.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from moe_unlearn.checkpoint.tensor_file import MODEL_FILES, Kind, kind_of, tensor_file
from moe_unlearn.files import whole_files, write_text
from moe_unlearn.ranks import gathered, on_first, sharded, together
from moe_unlearn.sharding import initialised

Write = Callable[[str, Tensor], None]


class Processor(Protocol):
    """Writes itself beside a model, as a tokenizer does."""

    def save_pretrained(self, save_directory: Any) -> object:
        """Write to a folder."""


def save_model(model: nn.Module, folder: str | Path, processor: Processor | None = None) -> None:
    """Write a model and its tokenizer as `save_pretrained` does, or as the model does itself; every rank calls this.

    The model does where `check_savable` refuses it and this process has its weights whole. Errors as there.
    """
    if is_savable(model) or sharded(model):
        save_pretrained(model, folder, processor)
    else:
        last = ADAPTER_CONFIG_NAME if has_adapters(model) else CONFIG_NAME
        on_first(partial(_write_itself, model, Path(folder), processor, last))


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    tokenizer: Processor | None = None,
    *,
    max_shard_size: int | str = "50GB",
    group: "distributed.ProcessGroup | None" = None,
) -> None:
    """Write model and tokenizer to `folder`, which `from_pretrained` loads with the same bits; every rank calls this.

    What else is in the folder stays, but for an earlier model or adapter. A process that is killed while the files take
    their places leaves no config.json. Raises on all ranks, and changes nothing: ValueError for a model that
    `check_savable` refuses; OSError where the first rank cannot write.
    """
    check_savable(model)
    first = not initialised() or distributed.get_rank(group) == 0
    errors: list[Exception] = []

    def attempt(action: Callable, *arguments: Any) -> Any:
        """Call `action` on the first rank, unless something failed there: the others wait for it meanwhile."""
        if first and not errors:
            try:
                return action(*arguments)
            except Exception as error:
                errors.append(error)
        return None

    if has_adapters(model):
        names = gathered(lambda: _adapters(model) if first else None, lambda found: found, group)[1][0]
        state = model.state_dict(keep_vars=True)
        whole = {name: _whole(state[name], keep=first) for name in names}
        itself = partial(_write_itself, state_dict=whole)
        attempt(itself, model, Path(folder), tokenizer, ADAPTER_CONFIG_NAME)
        together(partial(_raise_first, errors), group)
        return
    assert isinstance(model, PreTrainedModel)
    state = saved_state(model)
    groups = _groups(model, _meta(state))
    with ExitStack() as opened:
        write = attempt(_begin, model, opened, Path(folder), tokenizer, max_shard_size)
        together(partial(_raise_first, errors), group)
        for names in groups:
            # all ranks take part in gathering, whatever has become of writing
            whole = {name: _whole(state[name], keep=first) for name in names}
            attempt(_convert, model, whole, write)
        attempt(opened.close)
        together(partial(_raise_first, errors), group)


def has_adapters(model: nn.Module) -> bool:
    """Return whether a model is a PeftModel, which saves its adapters alone."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def is_savable(model: Any) -> bool:
    """Return whether `save_pretrained` saves a model."""
    try:
        check_savable(model)
    except ValueError:
        return False
    return True


def check_savable(model: Any) -> None:
    """Raise ValueError, which says why, for a model that `save_pretrained` does not save.

    It saves transformers models, and the adapters of PeftModels of one. It refuses models that have adapters of their
    own (`model.add_adapter`), those that are quantized and those in tensor parallelism, and adapters that are not made
    of weights of the model.
    """
    base = model.get_base_model() if has_adapters(model) else model
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"expected a transformers model or a PeftModel of one; got {type(base).__name__}")
    if getattr(base, "_hf_peft_config_loaded", False):
        raise ValueError("expected adapters by `peft.get_peft_model`; got a model with `add_adapter`")
    if base is model and getattr(base, "hf_quantizer", None) is not None:
        raise ValueError("expected a model that is not quantized")
    if getattr(getattr(base.config, "distributed_config", None), "tp_size", 1) > 1:
        raise ValueError("expected weights shared out by FSDP2 or expert parallelism; got tensor parallelism")
    if base is not model:
        _adapters(model)


def _adapters(model: Any) -> list[str]:
    """Return the names, in the model, of the weights that its adapters consist of."""
    # imported here because only models with adapters need it
    from peft import get_peft_model_state_dict

    layout = _meta(model.state_dict(keep_vars=True))
    names = {id(tensor): name for name, tensor in layout.items()}
    saved = [get_peft_model_state_dict(model, layout, adapter_name=adapter) for adapter in model.peft_config]
    try:
        return sorted({names[id(tensor)] for each in saved for tensor in each.values()})
    except KeyError:
        raise ValueError(
            "expected adapters whose files hold weights as they are in the model, as those of LoRA"
        ) from None


def _write_itself(model: Any, folder: Path, tokenizer: Processor | None, last: str, **options: Any) -> None:
    """Write a model by its own method, so that the file `last` takes its place last."""
    with whole_files(folder, last=(last,), stale=MODEL_FILES.fullmatch) as unfinished:
        model.save_pretrained(unfinished, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)


def saved_kinds(model: PreTrainedModel) -> dict[str, Kind]:
    """Return dtype and shape of what `save_pretrained` writes of a model, by the names of the hub."""
    return {name: kind_of(t) for name, t in revert_weight_conversion(model, _meta(saved_state(model))).items()}


def saved_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return what is saved of a model, by the names in memory, without ties."""
    ignored = set(model._keys_to_ignore_on_save or ())
    # the parameters themselves, so that those that are tied are one object
    state = {name: t for name, t in model.state_dict(keep_vars=True).items() if name not in ignored}
    kept = remove_tied_weights_from_state_dict(_meta(state), model)
    return {name: state[name] for name in kept}


def _meta(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of the same kinds as the whole ones, without storage; one for tensors that are one."""
    made = {id(t): torch.empty(t.shape, dtype=t.dtype, device="meta") for t in state.values()}
    return {name: made[id(t)] for name, t in state.items()}


def _groups(model: PreTrainedModel, layout: Mapping[str, Tensor]) -> list[list[str]]:
    """Return which weights are converted together: each by itself where that gives what all together give.

    The others go layer by layer, such as the three projections that a hub's file holds as one.
    """
    expected = {name: kind_of(t) for name, t in revert_weight_conversion(model, dict(layout)).items()}

    def fits(names: Collection[str]) -> bool:
        try:
            made = revert_weight_conversion(model, {name: layout[name] for name in names})
        except Exception:  # a conversion that lacks a tensor may fail in any way
            return False
        return all(expected.get(name) == kind_of(t) for name, t in made.items())

    groups: list[list[str]] = []
    layers: dict[str, list[str]] = {}
    for name in layout:
        if fits([name]):
            groups.append([name])
        else:
            number = re.search(r"\.\d+\.", name)
            layers.setdefault(name[: number.end()] if number else "", []).append(name)
    groups += layers.values()
    return groups if all(fits(names) for names in groups) else [list(layout)]


def _begin(
    model: PreTrainedModel,
    opened: ExitStack,
    folder: Path,
    tokenizer: Processor | None,
    max_shard_size: int | str,
) -> Write:
    """Write all but the weights, which take their places when `opened` closes; return what writes the weights."""
    layout = revert_weight_conversion(model, _meta(saved_state(model)))
    unfinished = opened.enter_context(
        whole_files(folder, last=(SAFE_WEIGHTS_INDEX_NAME, CONFIG_NAME), stale=MODEL_FILES.fullmatch)
    )
    split = split_torch_state_dict_into_shards(
        layout,
        filename_pattern=SAFE_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=max_shard_size,
    )
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    model.config.save_pretrained(unfinished)
    if model.can_generate():
        model.generation_config.save_pretrained(unfinished)
    if tokenizer is not None:
        tokenizer.save_pretrained(unfinished)
    if split.is_sharded:
        index = {
            "metadata": {"total_parameters": model.num_parameters(), **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        write_text(unfinished / SAFE_WEIGHTS_INDEX_NAME, json.dumps(index, indent=2, sort_keys=True) + "\n")
    writers: dict[str, Write] = {}
    for file, names in split.filename_to_tensors.items():
        kinds = {name: kind_of(layout[name]) for name in names}
        write = opened.enter_context(tensor_file(unfinished / file, kinds, {"format": "pt"}))
        writers |= dict.fromkeys(names, write)
    return lambda name, tensor: writers[name](name, tensor)


def _convert(model: PreTrainedModel, whole: dict[str, Tensor], write: Write) -> None:
    """Write whole weights in the hub's form, experts that it has one by one without a copy of all of them."""
    named = _names_by_expert(model, whole)
    parts = [{name: tensor[i : i + 1] for name, tensor in whole.items()} for i in range(len(named))] or [whole]
    for i, part in enumerate(parts):
        for name, tensor in revert_weight_conversion(model, part).items():
            write(named[i][name] if named else name, tensor)


def _names_by_expert(model: PreTrainedModel, whole: Mapping[str, Tensor]) -> list[dict[str, str]]:
    """Return for each expert how the hub names what the conversion makes of it alone, where it is called the first.

    Empty where the hub does not have the experts of these weights one by one, each under its number.
    """
    layout = _meta(whole)
    counts = {t.shape[0] if t.dim() > 2 else 0 for t in layout.values()}
    if len(counts) != 1 or counts == {0}:
        return []
    try:
        first = revert_weight_conversion(model, {name: t[:1] for name, t in layout.items()})
    except Exception:  # a conversion that knows only whole weights may fail in any way
        return []
    split = {name: name.rpartition(".0.") for name in first}
    named = [{name: f"{head}.{i}.{tail}" for name, (head, _, tail) in split.items()} for i in range(*counts)]
    made = {names[name]: kind_of(first[name]) for names in named for name in names}
    expected = {name: kind_of(t) for name, t in revert_weight_conversion(model, layout).items()}
    return named if made == expected else []


def _whole(tensor: Tensor, *, keep: bool) -> Tensor:
    """Return a weight as a whole, with all ranks; empty unless it is to be kept."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.detach() if keep else tensor.new_empty(0)


def _raise_first(errors: list[Exception]) -> None:
    for error in errors:
        raise error
