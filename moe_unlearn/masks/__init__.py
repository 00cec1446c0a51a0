"""Weight masks, one bit a weight: they say which weights may move.

They are held in memory, and on disk in our format or in WAGLE's official one.
"""

from moe_unlearn.masks.files import FORMATS, load, save
from moe_unlearn.masks.hub import from_hub, to_hub
from moe_unlearn.masks.weight_mask import WeightMask

__all__ = ["FORMATS", "WeightMask", "from_hub", "load", "save", "to_hub"]
