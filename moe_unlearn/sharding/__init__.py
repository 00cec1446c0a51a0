"""Weights that torch's FSDP2 or transformers' expert parallelism share out over ranks.

    rows      what each rank holds, sees and sums of a parameter, by arithmetic
    engine    what is asked of FSDP2: whole weights inside a forward pass, sums of gradients

Every weight is cut along dimension 0, so that a rank has whole rows of it, mask and optimizer state included.
"""

from moe_unlearn.sharding.engine import (
    add_up_gradients,
    as_forward,
    check_engine,
    check_versions,
    complete_,
    device_of,
    exchange_,
    initialised,
    narrows,
    of_peers,
    reset,
    reshard,
    sum_of_peers,
)
from moe_unlearn.sharding.rows import (
    EXPERTS,
    Placing,
    Rows,
    first_row,
    held_rows,
    is_sharded,
    like,
    part,
    placing_of,
    rows_here,
    rows_of_work,
    rowwise,
    whole,
)

__all__ = [
    "EXPERTS",
    "Placing",
    "Rows",
    "add_up_gradients",
    "as_forward",
    "check_engine",
    "check_versions",
    "complete_",
    "device_of",
    "exchange_",
    "first_row",
    "held_rows",
    "initialised",
    "is_sharded",
    "like",
    "narrows",
    "of_peers",
    "part",
    "placing_of",
    "reset",
    "reshard",
    "rows_here",
    "rows_of_work",
    "rowwise",
    "sum_of_peers",
    "whole",
]
