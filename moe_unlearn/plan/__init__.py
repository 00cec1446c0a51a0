"""Plans: a prediction of what a step will do, what it will cost and how much memory it will take.

`plan` makes the prediction from a `dry_run` of the step's own code on tensors without storage. `ways` says how each
trained weight gets its update, `costs` gives the work of each operation, and `memory` records what is held at once.
For a `mesh` of ranks, `one_rank` makes the dry run that of one of them. Where a device is too small, `advice` names the
`knobs` that make a run fit.
"""

from moe_unlearn.plan.advice import plan_with_advice
from moe_unlearn.plan.mesh import Mesh
from moe_unlearn.plan.plan import Plan, make_plan

__all__ = ["Mesh", "Plan", "make_plan", "plan_with_advice"]
