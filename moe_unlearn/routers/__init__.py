"""The router lever: what routers give for retain inputs stays as it is while everything else unlearns."""

from moe_unlearn.routers.collect import collect
from moe_unlearn.routers.kept import Kept, check_whole, closed, hold, kept_bytes, off, restricted
from moe_unlearn.routers.ridge import corrected, logits
from moe_unlearn.routers.stability import routes, stability, watched_batches
from moe_unlearn.routers.watch import Router, routers_of

__all__ = [
    "Kept",
    "Router",
    "check_whole",
    "closed",
    "collect",
    "corrected",
    "hold",
    "kept_bytes",
    "logits",
    "off",
    "restricted",
    "routers_of",
    "routes",
    "stability",
    "watched_batches",
]
