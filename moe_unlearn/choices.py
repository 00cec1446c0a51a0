"""Says which implementation of an op `"auto"` tries first; the data in choices.json are written from measurements.

    {"measured": what it was measured on, or null,
     "cuda": {"expert_wgrad.adamw": [{"elements": 0, "first": "triton"}, {"elements": 100000000, "first": "cuda"}]}}

An entry applies from its number of elements on; the elements are those of the tensor given to `backend.resolve`. Ops
without an entry keep the order of `backend`. `make gpu-report` writes the file; if "measured" is null, its entries are
guesses.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path

FILE = Path(__file__).with_name("choices.json")


@functools.cache
def table() -> Mapping[str, Mapping[str, list[dict]]]:
    """Return the file's entries by device type and registered name."""
    content = json.loads(FILE.read_text(encoding="utf-8"))
    return {device: names for device, names in content.items() if device != "measured"}


def first(name: str, device_type: str, elements: int | None = None) -> str | None:
    """Return the implementation of `name` to try first for `elements` elements; None if the file names none.

    Without a number of elements the entry for the largest tensors counts.
    """
    found = None
    for entry in table().get(device_type, {}).get(name, ()):
        if elements is None or entry["elements"] <= elements:
            found = entry["first"]
    return found
