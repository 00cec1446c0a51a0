"""Benchmarks of unlearning: a suite over a user's models and data, and the embedded experiment.

`suite` runs recipes and makes a `table` of their results. `demo` does so on `tiny_models`, which are trained when first
needed and kept in `trained_cache`; it works in several processes (`process_pool`).
"""

from moe_unlearn.benchmark.demo import demo, demo_recipe
from moe_unlearn.benchmark.suite import Progress, unlearning
from moe_unlearn.benchmark.table import Table
from moe_unlearn.runs.unlearn import unlearn

__all__ = ["Progress", "Table", "demo", "demo_recipe", "unlearn", "unlearning"]
