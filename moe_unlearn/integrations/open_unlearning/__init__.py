"""open-unlearning's trainers on this engine; `methods` describes their use and their differences."""

from moe_unlearn.integrations.open_unlearning.methods import (
    CEU,
    DPO,
    NPO,
    RMU,
    UNDIAL,
    WGA,
    GradAscent,
    GradDiff,
    SatImp,
    SimNPO,
)
from moe_unlearn.integrations.open_unlearning.pdu import PDU
from moe_unlearn.integrations.open_unlearning.registration import config_folder, register

__all__ = [
    "CEU",
    "DPO",
    "NPO",
    "PDU",
    "RMU",
    "UNDIAL",
    "WGA",
    "GradAscent",
    "GradDiff",
    "SatImp",
    "SimNPO",
    "config_folder",
    "register",
]
