"""open-unlearning's trainers on this engine; see `methods` for the use and for what differs."""

from moe_unlearn.integrations.open_unlearning.methods import (
    DPO,
    NPO,
    RMU,
    WGA,
    GradAscent,
    GradDiff,
    SatImp,
    SimNPO,
    config_folder,
    register,
)

__all__ = ["DPO", "NPO", "RMU", "WGA", "GradAscent", "GradDiff", "SatImp", "SimNPO", "config_folder", "register"]
