"""Loads models and tokenizers from folders, and from the hub where a model of it is named."""

import copy
import json
import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from safetensors import safe_open
from torch import distributed, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file

from moe_unlearn.config import geometry, models
from moe_unlearn.config.adapter import WIDTHS
from moe_unlearn.config.values import one_of
from moe_unlearn.delta.folder import OTHER_FORMS
from moe_unlearn.experts import NAME
from moe_unlearn.model import quantised
from moe_unlearn.model.adapters import check_peft
from moe_unlearn.model.modes import renamed_quietly
from moe_unlearn.model.one_copy import read_in_turn
from moe_unlearn.model.whole import named, whole_model
from moe_unlearn.sharding import check_versions, initialised

DTYPES = ("auto", "float32", "bfloat16", "float16")
_HUB = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")
_ADAPTER = "adapter_config.json"
_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_HINT = " (--allow-weights REGEX lets weights by)"


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How models are loaded, the same for all that a command loads.

    `device` is "auto" (the current GPU, or the CPU where there is none), "cpu", "cuda", "cuda:N", or "auto-map", which
    spreads a model over all devices as transformers' device_map="auto" does. `dtype` is "auto" (that of the
    checkpoint) or one of `DTYPES`. With `trust_remote_code` code that comes with a model is run. Weights that match the
    regular expression `allow_weights` may be missing from a checkpoint, which transformers then makes random, or have
    another shape or no place in the model. With `bits`, 8 or 4, linear layers and experts of causal models are rounded
    (`model.quantised`). With `fsdp` above 1 that many ranks, which are all there are, share the weights out, as
    DistributedConfig of transformers does, and groups of `ep` of them the experts.

    Raises ValueError for what is not here: a GPU, accelerate for "auto-map", the library of `bits`; and where several
    ranks run, which have a GPU each, for another device than theirs.
    """

    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    allow_weights: str | None = None
    fsdp: int = 1
    ep: int = 1
    bits: int | None = None

    def __post_init__(self) -> None:
        if re.fullmatch(r"auto|auto-map|cpu|cuda(:\d+)?", self.device) is None:
            raise ValueError(f"expected a device among auto, cpu, cuda, cuda:N and auto-map; got {self.device!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"expected a dtype among {', '.join(DTYPES)}; got {self.dtype!r}")
        if self.bits is not None:
            one_of("bits", self.bits, WIDTHS)
            quantised.check_library(self.bits)
        if self.device.startswith("cuda"):
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            if int(self.device.partition(":")[2] or 0) >= count:
                there = f"cuda:0 to cuda:{count - 1}" if count else "none"
                raise ValueError(f"device {self.device!r} is not here: the GPUs that torch sees are {there}")
        if self.device == "auto-map" and find_spec("accelerate") is None:
            raise ValueError(
                "device 'auto-map' needs the library 'accelerate', which is missing: pip install accelerate"
            )
        if initialised():
            theirs = "auto" if distributed.get_backend() == "nccl" else "auto or cpu"
            if self.device not in theirs.split(" or "):
                raise ValueError(f"each rank has a device of its own: expected {theirs}; got {self.device!r}")
        if self.allow_weights is not None:
            try:
                re.compile(self.allow_weights)
            except re.error as error:
                raise ValueError(f"expected a regular expression; got {self.allow_weights!r}: {error}") from error

    @property
    def device_map(self) -> str | None:
        """Return what `from_pretrained` is given, which then loads straight to the device; None for the CPU."""
        if self.device == "auto-map":
            return "auto"
        if self.device == "cpu" or not torch.cuda.is_available():
            return None
        return self.device if ":" in self.device else f"cuda:{torch.cuda.current_device()}"


def located(source: str | Path) -> tuple[str, dict[str, Any]]:
    """Return a model's folder, or its id on the hub, and what `from_pretrained` needs to find it.

    ORG/NAME or ORG/NAME@REVISION is a model of the hub, unless it is here, or a folder ORG is; nothing else is looked
    for in the network. Raises ValueError for a folder that is not there or holds neither a model nor an adapter.
    """
    folder, on_hub = Path(source), _HUB.fullmatch(str(source))
    if on_hub and not folder.exists() and not folder.parent.exists():
        return on_hub[1], {"revision": on_hub[2]} if on_hub[2] else {}
    if not (folder / "config.json").is_file() and not (folder / _ADAPTER).is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise ValueError(f"expected a model folder written by save_pretrained; {folder} {what}")
    return str(folder), {"local_files_only": True}


def folder_of(source: str | Path) -> Path:
    """Return the folder with the files of a model: its own, or that of the hub's cache, to which they are downloaded.

    Weights that are not in safetensors files beside its config are not downloaded. Raises ValueError, naming the
    source, for what is neither a folder nor on the hub, and where the hub cannot be reached and the cache lacks it.
    """
    if Path(source).is_dir():
        return Path(source)
    name, where = located(source)
    with named(source, "a model's files"):
        others = [*(f"*{form}" for form in OTHER_FORMS), "*/*.safetensors"]
        return Path(snapshot_download(name, revision=where.get("revision"), ignore_patterns=others))


def load_model(source: str | Path, how: Loading | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer from what `located` finds, straight to the device, in its dtype.

    The weights are read one tensor at a time, and there is no second copy of them but for the experts of one layer,
    while they are put together. Raises ValueError that names the source and what it lacks: weights that are missing,
    have another shape or no place, and code of its own that `how` does not trust.

    Of a folder with an adapter (PEFT) it is the base model that the adapter names, with the adapter, which alone
    trains. A base on the hub is taken from its cache on the disk, since nobody named it here. Raises ValueError too
    without the library peft, and for weights that are to be shared out.
    """
    how = Loading() if how is None else how
    base = _base_of(source)
    options: dict[str, Any] = {}
    if how.fsdp > 1:
        check_versions()
        # imported here because earlier versions of transformers have it otherwise or not at all
        from transformers.distributed.configuration_utils import DistributedConfig

        options["distributed_config"] = DistributedConfig(fsdp_size=how.fsdp, ep_size=how.ep)
    elif how.device_map is not None:
        options["device_map"] = how.device_map
    if how.bits is not None:
        options |= _rounded(source if base is None else base, how.bits)
    if base is None:
        return _load(source, AutoModelForCausalLM, "causal language model", how, **options)
    if how.fsdp > 1:
        raise ValueError(f"an adapter trains on whole weights; got {source} and weights that ranks share out")
    model, tokenizer = _load(base, AutoModelForCausalLM, "causal language model", how, **options)
    return _with_adapter(model, source), load_tokenizer(source, how) if _has_tokenizer(source) else tokenizer


def weightless(source: str | Path, how: Loading | None = None) -> PreTrainedModel:
    """Return a model as `load_model` would load it, without storage: no weight is read. Errors as there.

    Raises ValueError for an adapter too.
    """
    if _base_of(source) is not None:
        raise ValueError(f"expected a whole model; {source} is an adapter")
    how = Loading() if how is None else how
    return _load(source, AutoModelForCausalLM, "causal language model", how, device_map="meta")[0]


def described(model: nn.Module, source: str | Path, how: Loading) -> dict[str, Any]:
    """Return how a model was loaded: the source, the dtype and device(s) of its weights, whether its code was run."""
    return {
        "model": str(source),
        "dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})),
        "device": ", ".join(sorted({str(p.device) for p in model.parameters()})),
        "trust_remote_code": how.trust_remote_code,
    }


def load_classifier(folder: str | Path, how: Loading | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and the tokenizer of a sequence classifier (Toxic-BERT) in a folder; errors as `load_model`."""
    how = Loading() if how is None else how
    options: dict[str, Any] = {} if how.device_map is None else {"device_map": how.device_map}
    return _load(folder, AutoModelForSequenceClassification, "sequence classifier", how, **options)


def load_tokenizer(source: str | Path, how: Loading | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model alone, of an adapter's base if the adapter has none; errors as `load_model`."""
    how = Loading() if how is None else how
    base = None if _has_tokenizer(source) else _base_of(source)
    name, where = located(source if base is None else base)
    with named(source, "the tokenizer"):
        return _tokenizer(name, where, how)


def _has_tokenizer(source: str | Path) -> bool:
    return any((Path(source) / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))


def _base_of(source: str | Path) -> str | None:
    """Return the folder of the base model that the adapter in a folder names; None for what is no adapter's folder."""
    path = Path(source) / _ADAPTER
    if not path.is_file() or (path.parent / "config.json").is_file():
        return None
    check_peft(f"{source} is an adapter, which")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(base, str) or not base:
        raise ValueError(f"expected base_model_name_or_path in {path}; got {base!r}")
    if "local_files_only" in located(base)[1]:
        return base
    config = try_to_load_from_cache(base, "config.json", revision=revision)
    if not isinstance(config, str):
        raise ValueError(f"{source} is an adapter of {base}, which is not in the hub's cache: download it first")
    return str(Path(config).parent)


def _with_adapter(model: PreTrainedModel, source: str | Path) -> PreTrainedModel:
    # imported here because peft is optional
    from peft import PeftModel

    with named(source, "the adapter"), renamed_quietly(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        made: Any = PeftModel.from_pretrained(model, str(source), is_trainable=True, torch_device=str(model.device))
    adapted: PreTrainedModel = made.eval()
    return adapted


def _load(
    source: str | Path, kind: Any, what: str, how: Loading, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    name, where = located(source)
    with named(source, f"a {what} with its tokenizer"):
        adapter = find_adapter_config_file(name, **where)
    if adapter is not None:  # transformers would load its base too, and save the adapter alone
        raise ValueError(
            f"expected a model, or a folder with nothing but an adapter; {source} is a model with an adapter, or an "
            "adapter on the hub: download that to a folder"
        )
    in_turn = nullcontext() if {"device_map", "distributed_config"} & options.keys() else read_in_turn()
    own: dict[str, Any] = {"dtype": how.dtype, "trust_remote_code": how.trust_remote_code}
    loaded = f"a {what} with its tokenizer"
    with in_turn:
        model = whole_model(name, kind, loaded, source, how.allow_weights, _HINT, **where, **own, **options)
    with named(source, loaded):
        tokenizer = _tokenizer(name, where, how)
    quantised.keep_layout(model)
    return model.eval(), tokenizer


def _rounded(source: str | Path, bits: int) -> dict[str, Any]:
    """Return what rounds the weights of a model to `bits` as it is loaded; ValueError for one that is quantised."""
    if method := stored_as(source):
        raise ValueError(
            f"expected whole weights to round to {bits} bits; those of {source} are quantised ({method}): leave bits "
            "out, and the adapter is trained on them as they are"
        )
    return {"quantization_config": quantised.config_of(bits, meta_model(source)), "experts_implementation": NAME}


def check_whole(source: str | Path, what: str) -> None:
    """Raise ValueError, which says `what` needs whole weights, for a model whose config says they are quantised."""
    if method := stored_as(source):
        raise ValueError(
            f"{what} needs whole weights, and those of {source} are quantised ({method}): give the model before it was"
        )


def is_adapter(source: str | Path) -> bool:
    """Return whether a folder holds an adapter alone; errors as `load_model` for one without its base."""
    return _base_of(source) is not None


def stored_as(source: str | Path) -> str | None:
    """Return how the weights of a model, or of an adapter's base, are quantised; None for whole ones, and for unknown.

    Its config alone is read.
    """
    base = _base_of(source)
    name, where = located(source if base is None else base)
    with named(source, "a model's config"):
        settings, _ = PreTrainedConfig.get_config_dict(name, **where)
    return quantised.method_of(settings.get("quantization_config"))


def _tokenizer(name: str, where: dict[str, Any], how: Loading) -> PreTrainedTokenizerBase:
    made: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        name, trust_remote_code=how.trust_remote_code, **where
    )
    return made


def meta_model(source: str | Path | PreTrainedConfig, *, layers: int | None = None, dtype: str = "auto") -> nn.Module:
    """Build a causal LM without storage, on the meta device; `dtype` is as `Loading` has it.

    `source` is a config, a name in `models()`, a folder with a config.json, the path of such a file, or a model of the
    hub, of which the config alone is read; of a folder without a dtype in it, also the head of its first file of
    weights. With `layers` the model has so many of its first layers alone. Raises ValueError for anything else.
    """
    if isinstance(source, PreTrainedConfig):
        made = copy.deepcopy(source)
    elif source in models():
        made = AutoConfig.for_model(**geometry(source))
    else:
        where: dict[str, Any] = {"local_files_only": True}
        name = str(source)
        if not Path(source).exists():
            if _HUB.fullmatch(name) is None:
                raise ValueError(f"no model {name!r}: a folder, a config.json or one of {', '.join(models())}")
            name, where = located(source)
        try:
            made = AutoConfig.from_pretrained(name, trust_remote_code=False, **where)
        except Exception as error:  # transformers raises many kinds for a damaged file
            raise ValueError(f"cannot read a model's config from {source}: {error}") from error
    if layers is not None:
        of_layers = {name: value for name, value in vars(made).items() if _one_each(value, made.num_hidden_layers)}
        made.update({name: value[:layers] for name, value in of_layers.items()} | {"num_hidden_layers": layers})
    if dtype != "auto":
        chosen = getattr(torch, dtype)
    else:
        chosen = made.dtype or (None if isinstance(source, PreTrainedConfig) else _dtype_of(Path(source)))
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(made, dtype=chosen, trust_remote_code=False)
    return model


def unloaded(model: nn.Module) -> Callable[..., nn.Module]:
    """Return `meta_model` of a model's own config and dtype, which takes `layers` alone.

    Raises ValueError if that is not this model: its weights have other names or shapes, as with adapters.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(f"a {type(model).__name__} has no config of transformers")
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    build = partial(meta_model, config, dtype=str(dtype).removeprefix("torch."))
    own, made = ({name: p.shape for name, p in m.named_parameters()} for m in (model, build()))
    other = next((name for name in (*own, *made) if own.get(name) != made.get(name)), None)
    if other is not None:
        raise ValueError(f"{other} is not the weight of that name that the model's config makes")
    return build


def _dtype_of(folder: Path) -> torch.dtype | None:
    """Return the first floating dtype that a folder's weights have, as transformers takes it; None without weights."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            names = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        return next((dtype for name, dtype in _FLOATS.items() if name in names), None)
    return None


def _one_each(value: object, layers: int) -> bool:
    """Return whether a value of a config has an entry for each layer."""
    return isinstance(value, list | tuple) and len(value) == layers
