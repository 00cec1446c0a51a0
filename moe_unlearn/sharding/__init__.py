"""Weights that torch's FSDP2 or transformers' expert parallelism share out over ranks.

    rows      what each rank holds, sees and sums of a parameter, by arithmetic

Every weight is cut along dimension 0, so that a rank has whole rows of it, mask and optimizer state included.
"""

from moe_unlearn.sharding.rows import Placing, Rows, is_sharded, part, placing_of, rows_of

__all__ = ["Placing", "Rows", "is_sharded", "part", "placing_of", "rows_of"]
