"""The eight ops. Each file: formula, public function, `<op>_ref` beside it, custom op, autograd."""

from moe_unlearn.ops.route import Routing, route, route_ref

__all__ = ["Routing", "route", "route_ref"]
