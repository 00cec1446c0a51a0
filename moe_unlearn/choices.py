"""Which implementation `"auto"` takes first where an op has several: data in choices.json, written from measurements.

    {"measured": what it was measured on, or null,
     "cuda": {"expert_wgrad.adamw": [{"elements": 0, "first": "triton"}, {"elements": 100000000, "first": "cuda"}]}}

An entry holds from its number of elements on, of the tensor by which `backend.resolve` chooses. What is not listed goes
in the order of `backend`. `make gpu-report` writes the file; entries with nothing measured are guesses.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path

FILE = Path(__file__).with_name("choices.json")


@functools.cache
def table() -> Mapping[str, Mapping[str, list[dict]]]:
    """The file's entries by device type and registered name."""
    content = json.loads(FILE.read_text(encoding="utf-8"))
    return {device: names for device, names in content.items() if device != "measured"}


def first(name: str, device_type: str, elements: int | None = None) -> str | None:
    """The implementation of `name` to take first for so many elements (None: for large ones); None is no wish."""
    found = None
    for entry in table().get(device_type, {}).get(name, ()):
        if elements is None or entry["elements"] <= elements:
            found = entry["first"]
    return found
