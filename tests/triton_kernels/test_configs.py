"""Every tile fits into the shared memory of the architecture that it is chosen for."""

import itertools

import pytest
import torch

from moe_unlearn.regress import ledger
from moe_unlearn.triton_kernels import configs
from moe_unlearn.triton_kernels.configs import MatmulTile, OuterTile

BF16, FP32 = torch.bfloat16, torch.float32
CAPABILITIES = (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
FLAGS = [(False, True)] * 2
pytestmark = pytest.mark.quick


def stages(tile: MatmulTile | OuterTile, dtype: torch.dtype, matrices: int = 1) -> int:
    """Bytes of the operands that are in flight; `matrices`: how many right operands a tile multiplies."""
    if isinstance(tile, OuterTile):
        # row numbers are loaded ahead: three blocks of rows are in flight whatever the number of stages
        return min(tile.num_stages, 3) * tile.block_rows * (tile.block_m + tile.block_p) * dtype.itemsize
    return tile.num_stages * tile.depth * (tile.rows + matrices * tile.columns) * dtype.itemsize


def chosen(arch: int):
    """(name, bytes) of every tile that shapes may take."""
    for dtype, rows, (aligned, flag) in itertools.product((BF16, FP32), (1, 512, 100_000), itertools.product(*FLAGS)):
        tiles = configs.expert_mlp(rows, 2048, flag, dtype, arch, aligned)
        yield "gate_up", stages(tiles.gate_up, dtype, 2)
        yield "linear", stages(tiles.linear, dtype)
        yield "activation", stages(tiles.activation, dtype)
        for long in (False, True):
            losses = configs.token_loss(rows, 151_936, dtype, arch, flag, long, aligned)
            # kl multiplies the reference's rows too, and its head if that is another one
            yield "logits", stages(losses.logits, dtype) * (2 if flag else 1)
            yield "grad_hidden", stages(losses.grad_hidden, dtype)
            yield "grad_head", stages(losses.grad_head, dtype)
        for epilogue in ("store", "pair", "weights", "state", "update"):
            yield epilogue, stages(configs.expert_wgrad(epilogue, (8, 1536, 2048), rows, flag, dtype, arch, 132), dtype)


@pytest.mark.parametrize("arch", CAPABILITIES)
def test_tiles_fit_into_shared_memory(arch):
    too_large = {name: size for name, size in chosen(arch) if size > ledger.shared_bytes(arch)}
    assert not too_large


def test_every_architecture_has_tiles_of_one_that_was_measured():
    assert [configs.tiles_of(arch) for arch in (75, *CAPABILITIES)] == [80] * 5 + [90, 100, 100, 100, 80, 80]
    for arch in configs.ARCHITECTURES:
        assert configs.tiles_of(arch) == arch
