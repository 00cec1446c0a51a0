"""Calls ops with the fields of their objects as keywords, so that a case may name each argument that it changes.

A comparison of revisions runs these cases on ops of earlier trees too, which had no objects and took the fields so.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from moe_unlearn import ops
from moe_unlearn.ops.expert_wgrad import Factors


def by_keyword(op: Callable) -> Callable:
    """Return an op, or its reference, that takes the fields of its objects as keywords.

    A head's weight is `lm_head`, the fields of a reference are `ref_hidden_states` and `ref_lm_head`.
    """
    kinds = _objects(op.__name__, inspect.signature(op).parameters)

    @functools.wraps(op)
    def call(*arguments: Any, **options: Any) -> Any:
        if "rule" in kinds and "betas" in options:  # as torch's optimizer has them
            options["beta1"], options["beta2"] = options.pop("betas")
        for name, (kind, fields) in kinds.items():
            given = {field: options.pop(flat) for flat, field in fields.items() if flat in options}
            if given or name not in _OPTIONAL:
                options[name] = kind(**given)
        return op(*arguments, **options)

    return call


_OPTIONAL = ("factors", "reference")  # what may be given as it is, or not at all


def _objects(op: str, parameters: Mapping[str, inspect.Parameter]) -> dict[str, tuple[type, dict[str, str]]]:
    """Return, by the parameter, the type of each object that an op takes and the fields by their flat names."""
    known = {
        "factors": lambda: (Factors, {}),
        "rule": lambda: (ops.AdamW if "adamw" in op else ops.SGD, {}),
        "update": lambda: (ops.Update, {}),
        "weights": lambda: (ops.ExpertWeights, {}),
        "layout": lambda: (ops.ExpertLayout, {}),
        "head": lambda: (ops.Head, {"weight": "lm_head"}),
        "reference": lambda: (ops.Reference, {"hidden_states": "ref_hidden_states", "lm_head": "ref_lm_head"}),
    }
    found = {name: make() for name, make in known.items() if name in parameters}
    return {
        name: (kind, {renamed.get(field, field): field for field in kind._fields})
        for name, (kind, renamed) in found.items()
    }
