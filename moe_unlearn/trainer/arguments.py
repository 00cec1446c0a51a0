"""TrainingArguments of a recipe's `trainer` section, and what a recipe decides against them."""

import dataclasses
import difflib
import enum
import types
import typing
import warnings
from typing import Any

from transformers import TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from moe_unlearn.config import Recipe
from moe_unlearn.config.trainer import OWNED

_Made = typing.TypeVar("_Made", bound=TrainingArguments)
_FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}
#: what the optimizer of a recipe decides, by the argument that is not looked at
_DECIDED = {
    "learning_rate": lambda own: own.lr,
    "weight_decay": lambda own: own.weight_decay,
    "adam_beta1": lambda own: own.betas[0],
    "adam_beta2": lambda own: own.betas[1],
    "adam_epsilon": lambda own: own.eps,
    "optim": lambda own: own.name,
    "optim_args": lambda own: None,
    "optim_target_modules": lambda own: None,
}
#: what the arguments decide, by the key of the recipe's optimizer that is not looked at
_NOT_READ = ("warmup_steps", "max_grad_norm")


def checked(section: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords of `TrainingArguments` that a recipe's `trainer` section gives.

    Numbers may be written as text (YAML reads 1e-4 so). Raises ValueError, which names the key and for a mistyped one
    the nearest, for a key or a value that TrainingArguments does not have, and for a tracker that is not installed.
    """
    hints, given = typing.get_type_hints(TrainingArguments), {}
    for key, value in section.items():
        if key not in _FIELDS:
            near = difflib.get_close_matches(key, _FIELDS.keys() - OWNED.keys(), n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown recipe key 'trainer.{key}'; {hint}valid keys are those of TrainingArguments")
        given[key] = _fitting(f"trainer.{key}", value, hints[key])
    trackers = given.get("report_to") or []
    _check_trackers([trackers] if isinstance(trackers, str) else trackers)
    return given


def _check_trackers(names: list[str]) -> None:
    """Raise ValueError for a tracker that transformers does not know, and for one that is not installed."""
    here = get_available_reporting_integrations()
    for name in names:
        if name not in ("none", "all", *INTEGRATION_TO_CALLBACK):
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(f"trainer.report_to must be none, all, or some of {known}; got {name!r}")
        if name not in ("none", "all", *here):
            raise ValueError(
                f"trainer.report_to: {name!r} is not installed here: pip install {name}, or trainer.report_to="
                f"{' or '.join(['none', *here])}"
            )


def _fitting(name: str, value: Any, hint: Any) -> Any:
    """Return a value as an argument of this type takes it; ValueError if none does."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    kinds = typing.get_args(hint) if union else (hint,)
    plain = [typing.get_origin(kind) or kind for kind in kinds]
    words = [
        [member.value for member in kind] for kind in plain if isinstance(kind, type) and issubclass(kind, enum.Enum)
    ]
    if words and isinstance(value, bool):
        value = "steps" if value else "no"  # YAML 1.1 reads the word no as false
    if words and value not in words[0]:
        raise ValueError(f"{name} must be one of {', '.join(words[0])}; got {value!r}")
    if type(value) in plain or words:
        return value
    if float in plain and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    expected = " or ".join("null" if kind is types.NoneType else getattr(kind, "__name__", str(kind)) for kind in plain)
    raise ValueError(f"{name} must be {expected}; got {value!r}")


def made(cls: type[_Made], section: dict[str, Any], **own: Any) -> _Made:
    """Make TrainingArguments of the keywords `own` and, before them, those of a recipe's `trainer` section.

    Raises ValueError, which names the section, for values that do not go together.
    """
    keywords = own | checked(section)
    try:
        return cls(**keywords)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        if not section:
            raise
        raise ValueError(f"trainer ({', '.join(section)}): {error}") from error


def warn_of_conflicts(args: TrainingArguments, recipe: Recipe) -> None:
    """Warn, by name, of arguments and keys of the recipe that another one decides against.

    Arguments that have transformers' own default are taken for not given.
    """
    own, conflicts = recipe.optimizer, []
    for name, of in _DECIDED.items():
        value, decided = getattr(args, name), of(own)
        if value != _FIELDS[name].default and value != decided and not _names(value, decided):
            conflicts.append(f"TrainingArguments.{name}={_shown(value)} ({OWNED[name]} is {decided})")
    for name in _NOT_READ:
        wanted, value = getattr(own, name), getattr(args, name)
        if wanted and wanted != value:
            conflicts.append(f"optimizer.{name}={wanted:g} of the recipe (TrainingArguments.{name} is {value:g})")
    for name, wanted in checked(recipe.trainer).items():
        if getattr(args, name, wanted) not in (wanted, [wanted]) and wanted != "all":
            conflicts.append(
                f"trainer.{name}={wanted} of the recipe (TrainingArguments.{name} is {getattr(args, name)})"
            )
    if conflicts:
        warnings.warn(
            f"not used: {'; '.join(conflicts)}. The recipe decides the optimizer, TrainingArguments the loop and its "
            "schedule: give one value in the one place that counts",
            stacklevel=3,
        )


def _shown(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value


def _names(value: Any, decided: Any) -> bool:
    """Return whether a value is one of transformers' names of the optimizer, such as adamw_torch."""
    return isinstance(value, enum.Enum) and isinstance(decided, str) and str(value.value).startswith(decided)
