"""Which weights may move: masks of one bit a weight, in memory and on disk, in our form and in WAGLE's official one."""

from moe_unlearn.masks.files import FORMATS, from_hub, load, save, to_hub
from moe_unlearn.masks.weight_mask import WeightMask

__all__ = ["FORMATS", "WeightMask", "from_hub", "load", "save", "to_hub"]
