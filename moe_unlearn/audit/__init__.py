"""Audit an unlearned model: try to bring back what it forgot, and decide with known error rates whether it came."""

from moe_unlearn.audit.attack import SCORES, Attack, Outcome, Settings, Target, Variant
from moe_unlearn.audit.judge import MARGINS, Evidence, Finding
from moe_unlearn.audit.run import ATTACKS, Plan, Report, audit
from moe_unlearn.audit.verdict import VERDICTS, Documents, Share, holm, share, verdicts, worst

__all__ = [
    "ATTACKS",
    "Attack",
    "Documents",
    "Evidence",
    "Finding",
    "MARGINS",
    "Outcome",
    "Plan",
    "Report",
    "SCORES",
    "Settings",
    "Share",
    "Target",
    "VERDICTS",
    "Variant",
    "audit",
    "holm",
    "share",
    "verdicts",
    "worst",
]
