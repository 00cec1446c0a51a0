"""What a step will do, what it will cost and how much memory it will take, before any of it is done.

`plan` says it, from a `dry_run` of the step's own code on tensors without storage; `ways` is how each trained weight
gets its update, `costs` the work of each operation, `memory` what is held at once.
"""

from moe_unlearn.plan.plan import Plan, make_plan

__all__ = ["Plan", "make_plan"]
