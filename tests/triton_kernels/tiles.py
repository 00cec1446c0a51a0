"""Tiles so small that small shapes have several in each direction, with tails, and the interpreter stays quick.

Each function makes `configs` choose them for its op; on sm_90 kernels read by descriptors what these can name.
"""

import pytest


def expert_wgrad(patch: pytest.MonkeyPatch, arch: int = 90) -> None:
    """Tiles of 32 x 64 of 16 rows, walked down two at a time."""
    _shrink(patch, arch, "expert_wgrad", lambda tile: tile._replace(block_m=32, block_p=64, block_rows=16, group=2))


def _shrink(patch: pytest.MonkeyPatch, arch: int, op: str, small) -> None:
    """Choose the architecture, and change by `small` what `configs` chooses for the op."""
    from moe_unlearn.triton_kernels import configs  # late: mutants replace the package

    patch.setenv("MOE_UNLEARN_TRITON_ARCH", str(arch))
    choose = getattr(configs, op)
    patch.setattr(configs, op, lambda *arguments: small(choose(*arguments)))
