"""Loads a checkpoint's weights where they are whole, and names what is wrong with it where they are not."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from logging import LogRecord, getLogger
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from moe_unlearn.errors import reason_of
from moe_unlearn.model.finite import not_finite

_SHOWN = 3  # weights that a message names
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # what configs call their number
_log = getLogger(__name__)


def whole_model(
    name: str | Path,
    kind: Any,
    what: str,
    source: str | Path,
    allowed: str | None = None,
    hint: str = "",
    *,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """Load what `kind.from_pretrained(name, **options)` loads, from a checkpoint that has its weights and no others.

    Raises ValueError, which names `what` is loaded, its `source` and the weights: for those that are missing, have
    another shape or no place, with the `hint`, unless they match the regular expression `allowed`; for an index that
    leads out of the folder; for more experts a token than there are; and for weights that are NaN or infinite, which
    takes one pass over them.
    """
    _check_index(Path(name))
    # shapes that differ are then in `info`, by name, and not in a table on stderr
    checked = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with named(source, what), no_loading_bars():
        loaded: tuple[PreTrainedModel, dict[str, Any]] = kind.from_pretrained(
            name, trust_remote_code=trust_remote_code, **checked, **options
        )
    model, info = loaded
    _check_weights(source, info, allowed, hint)
    _check_experts(source, model.config)
    check_finite(source, model.named_parameters())
    return model


def _check_index(folder: Path) -> None:
    """Raise ValueError for an index of weights that names files elsewhere."""
    for path in folder.glob("*.index.json"):
        try:
            names = {*json.loads(path.read_bytes())["weight_map"].values()}
            wrong = sorted(str(name) for name in names if Path(name).name != name)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: expected the index of a model's files: {error!r}") from error
        if wrong:
            raise ValueError(f"{path}: expected names of files beside it; got {wrong[0]!r}")


def _check_weights(source: str | Path, info: dict[str, Any], allowed: str | None, hint: str) -> None:
    """Raise ValueError, which names them, for weights that a checkpoint lacks, and for those it has for nothing."""
    found = {
        "lacks": {*info["missing_keys"]},
        "has another shape of": {name for name, *_ in info["mismatched_keys"]},
        "has what this model has not:": {*info["unexpected_keys"]},
    }
    for what, names in found.items():
        let_by = {name for name in names if allowed is not None and re.search(allowed, name)}
        if wrong := sorted(names - let_by):
            raise ValueError(f"expected a whole checkpoint in {source}; it {what} {_listed(wrong)}{hint}")
        if let_by:
            _log.warning("%s %s %s, which is allowed", source, what, ", ".join(sorted(let_by)))


def _check_experts(source: str | Path, config: PreTrainedConfig) -> None:
    """Raise ValueError for a config that asks for more experts a token than there are."""
    text = config.get_text_config()
    asked = getattr(text, "num_experts_per_tok", None)
    for name in _EXPERTS:
        count = getattr(text, name, None)
        if isinstance(asked, int) and isinstance(count, int) and asked > count:
            raise ValueError(f"expected num_experts_per_tok of at most {name} ({count}) in {source}; got {asked}")


def check_finite(source: str | Path, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ValueError that names the weights with a number that is NaN or infinite."""
    if wrong := not_finite(weights):
        raise ValueError(f"expected finite weights in {source}; NaN or infinite: {_listed(wrong)}")


def _listed(names: list[str]) -> str:
    """Return the first names, and how many more there are."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


@contextmanager
def named(source: str | Path, what: str) -> Iterator[None]:
    """Make one ValueError, which names the source, of all that transformers and safetensors raise inside."""
    reports: list[str] = []

    def hold_back(record: LogRecord) -> bool:
        report = "LOAD REPORT" in record.getMessage()  # of transformers: a table of what `_check_weights` says
        reports.extend([record.getMessage()] * report)
        return not report

    handlers = transformers.utils.logging.get_logger("transformers").handlers
    for handler in handlers:
        handler.addFilter(hold_back)
    try:
        yield
    except Exception as error:  # they raise many kinds for a damaged folder
        why = reason_of(error)  # further lines list every model that transformers knows
        if misfits := re.findall(r"^(\S.*?) *\| *CONVERSION", "\n".join(reports), re.MULTILINE):
            why = f"it lacks parts of {', '.join(misfits[:_SHOWN])}, or they have other shapes"
        if "trust_remote_code" in str(error):
            why += " It is run with --trust-remote-code alone."
        raise ValueError(f"cannot load {what} from {source}: {why}") from error
    finally:
        for handler in handlers:
            handler.removeFilter(hold_back)


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
