"""Registration of the trainers in open-unlearning's registry, and the folder of their YAML files."""

from collections.abc import MutableMapping
from importlib import resources
from pathlib import Path

from moe_unlearn.integrations.open_unlearning.methods import (
    CEU,
    DPO,
    NPO,
    PREFIX,
    RMU,
    UNDIAL,
    WGA,
    GradAscent,
    GradDiff,
    SatImp,
    SimNPO,
)
from moe_unlearn.integrations.open_unlearning.pdu import PDU

METHODS = (GradAscent, GradDiff, NPO, SimNPO, WGA, SatImp, CEU, UNDIAL, PDU, DPO, RMU)


def register(registry: MutableMapping[str, type] | None = None) -> None:
    """Add the methods, as MoENPO and so on, to open-unlearning's TRAINER_REGISTRY; None imports that.

    Raises ImportError if its package `trainer` cannot be imported, ValueError if a name is taken.
    """
    registry = _registry() if registry is None else registry
    for method in METHODS:
        if registry.setdefault(f"{PREFIX}{method.__name__}", method) is not method:
            raise ValueError(f"the registry has another trainer named {PREFIX}{method.__name__}")


def _registry() -> MutableMapping[str, type]:
    try:
        from trainer import TRAINER_REGISTRY
    except ImportError as error:
        raise ImportError(
            "open-unlearning's package `trainer` cannot be imported: run inside its checkout with src/ on the path, or "
            "pass its TRAINER_REGISTRY"
        ) from error
    registry: MutableMapping[str, type] = TRAINER_REGISTRY
    return registry


def config_folder() -> Path:
    """Return the folder of YAML files for open-unlearning's configs/trainer."""
    return Path(str(resources.files("moe_unlearn") / "integrations" / "open_unlearning" / "trainer"))
