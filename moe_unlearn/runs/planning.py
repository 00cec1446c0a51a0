"""Plans of runs from a model's config alone, without weights, and what to change where a device is too small."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedConfig

from moe_unlearn.config import Recipe
from moe_unlearn.model.adapters import adapted
from moe_unlearn.model.batches import Batch
from moe_unlearn.model.loading import meta_model
from moe_unlearn.plan import Mesh, Plan
from moe_unlearn.plan.advice import Unloaded, add_remedies
from moe_unlearn.step import UnlearnStep

SIZES = (80.0, 141.0)  # GiB of the devices that are asked about unless others are named


def plan_of_config(
    source: str | Path | PreTrainedConfig,
    recipe: Recipe,
    forget: Iterable[Batch] = (),
    retain: Iterable[Batch] = (),
    *,
    mesh: Mesh | str | None = None,
    fits: Sequence[float] = SIZES,
    dtype: str = "auto",
    advise: bool = True,
) -> Plan:
    """Plan a run of the model whose config `meta_model` finds, with what to change for devices that are too small.

    No model is loaded; see `Unloaded`. Without `advise` nothing is said of what to change.
    """
    mesh = Mesh.parse(mesh) if isinstance(mesh, str) else mesh
    sides = list(forget), list(retain)

    def build(**layers: int) -> nn.Module:
        return adapted(meta_model(source, dtype=dtype, **layers), recipe)

    search = Unloaded(build, UnlearnStep, sides, mesh, fits).search(recipe)
    plan = search.plan()
    if advise:
        add_remedies(plan, search)
    return plan
