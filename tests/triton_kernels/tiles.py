"""Tiles so small that small shapes have several in each direction, with tails, and the interpreter stays quick.

Each function makes `configs` choose them for its op; on sm_90 kernels read by descriptors what these can name.
"""

import pytest


def expert_mlp(patch: pytest.MonkeyPatch, arch: int = 90) -> None:
    """Tiles of 16 x 16 x 16; on sm_90 persistent, and by descriptors in float32 too, whose shipped tiles use none."""

    def small(config, *arguments):
        *_, aligned = arguments
        tile = {"rows": 16, "columns": 16, "depth": 16, "group": 2}
        tile |= {"persistent": arch >= 90, "descriptors": arch >= 90 and aligned}
        changed = {name: getattr(config, name)._replace(**tile) for name in ("gate_up", "linear", "activation")}
        return config._replace(**changed, activation_slices=2, weights_hidden=32, sum_columns=32)

    _shrink(patch, arch, "expert_mlp", small)


def expert_wgrad(patch: pytest.MonkeyPatch, arch: int = 90) -> None:
    """Tiles of 32 x 64 of 16 rows, walked down two at a time."""
    _shrink(patch, arch, "expert_wgrad", lambda tile, *_: tile._replace(block_m=32, block_p=64, block_rows=16, group=2))


def token_loss(patch: pytest.MonkeyPatch, arch: int = 90) -> None:
    """Tiles of 32 rows and columns, and splits of a few of them: a few dozen rows cross every boundary."""

    def tile(of, rows, columns):
        return of._replace(rows=rows, columns=columns, depth=16, group=2)

    def small(config, *_):
        tiles = {"logits": (32, 32), "grad_hidden": (32, 16), "grad_head": (16, 32)}
        return config._replace(
            **{name: tile(getattr(config, name), *size) for name, size in tiles.items()},
            tiles_per_split=2,
            chunk=64,
            split_tiles=12,
            splits=2,
            kept_rows=32,
            kept_splits=2,
            pair_tiles=2,
            merge_rows=16,
            merge_splits=2,
        )

    _shrink(patch, arch, "token_loss", small)


def _shrink(patch: pytest.MonkeyPatch, arch: int, op: str, small) -> None:
    """Choose the architecture, and change by `small` what `configs` chooses for the op from its arguments."""
    from moe_unlearn.triton_kernels import configs  # late: mutants replace the package

    patch.setenv("MOE_UNLEARN_TRITON_ARCH", str(arch))
    choose = getattr(configs, op)
    patch.setattr(configs, op, lambda *arguments: small(choose(*arguments), *arguments))
