"""Chooses all tile sizes, by functions of shape, dtype and architecture; no other module holds any.

`architecture` is the compute capability as one number: 80 (A100), 90 (H100, H200), 100 (B200). Other GPUs take the
tiles of the nearest of these that fit (`tiles_of`). On the CPU, where kernels run in the interpreter, it is 90 unless
MOE_UNLEARN_TRITON_ARCH says otherwise; the same variable lets a machine without a GPU compile for any GPU, and so does
`compiling_for`, which knows the number of multiprocessors too.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

ARCHITECTURES = (80, 90, 100)
_INTERPRETED_PROGRAMS = 3
MAX_SPANS = 2048
KEPT_BYTES = 300 * 2**20


class Target(NamedTuple):
    """A GPU as far as compiling needs it: its compute capability and its number of multiprocessors."""

    architecture: int
    multiprocessors: int


# those with the full chip: H100 and H200 as SXM
GPUS = {"a100": Target(80, 108), "h100": Target(90, 132), "h200": Target(90, 132), "b200": Target(100, 148)}
_target: Target | None = None


@contextlib.contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """Choose every tile inside as on `target`, wherever tensors lie."""
    global _target
    before, _target = _target, target
    try:
        yield
    finally:
        _target = before


def architecture(device: torch.device) -> int:
    """Return the compute capability for which kernels on `device` are compiled."""
    if _target is not None:
        return _target.architecture
    assumed = os.environ.get("MOE_UNLEARN_TRITON_ARCH")
    if assumed:
        return int(assumed)
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tiles_of(arch: int) -> int:
    """Return the one of ARCHITECTURES whose tiles `arch` takes.

    GeForce and workstation Blackwell (120, 121) multiply by Ampere's instructions and have 99 KB of shared memory,
    which Hopper's tiles exceed. They exceed that of Ada and the smaller Amperes (86, 89) too.
    """
    return 80 if arch >= 120 else max(known for known in ARCHITECTURES if known <= max(arch, 80))


def num_programs(device: torch.device) -> int:
    """Return the number of programs of a persistent kernel: one per multiprocessor, or a few in the interpreter."""
    if _target is not None:
        return _target.multiprocessors
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


class MaskedUpdate(NamedTuple):
    block_words: int
    num_warps: int


def masked_update(shape: tuple[int, ...], dtype: torch.dtype, arch: int) -> MaskedUpdate:
    """Choose eight elements a thread: one 16-byte access to a bfloat16 tensor, two to its float32 moments."""
    return MaskedUpdate(block_words=32, num_warps=4)


class Route(NamedTuple):
    """Tiles of `route`, in rows.

    A scatter program holds the counts of `chunk` blocks and sums `cells` elements of the histogram at a time.
    """

    tokens_per_block: int
    blocks: int
    count_tile: int
    tile: int
    chunk: int
    cells: int
    num_warps: int


def route(num_tokens: int, top_k: int, num_experts: int) -> Route:
    """Choose about one block per multiprocessor; each scatter program reads the counts of all blocks."""
    # one row per thread, since the comparison of all pairs costs a thread 128 registers
    tile = 128
    limit = 128 if num_tokens * top_k <= 2**20 else 256
    tokens_per_block = max(-(-2 * tile // top_k), -(-num_tokens // limit))
    blocks = max(1, -(-num_tokens // tokens_per_block))
    # 4096 counts in flight, 32 per thread
    chunk = max(1, min(64, 4096 // (1 << (num_experts - 1).bit_length())))
    return Route(tokens_per_block, blocks, 512, tile, chunk, 16, 4)


class RetainWeights(NamedTuple):
    block: int
    num_warps: int


def retain_weights() -> RetainWeights:
    """Choose the block of tokens that a program weighs."""
    return RetainWeights(block=128, num_warps=4)


class Moments(NamedTuple):
    """Tiles of the moments; `block` tokens are weighed at a time.

    A program of the second stage adds `sum_chunks` x `sum_block` elements at a time.
    """

    tokens_per_chunk: int
    chunks: int
    block: int
    num_warps: int
    sum_block: int
    sum_chunks: int


def moments(num_tokens: int, size: int) -> Moments:
    """Choose about four programs per multiprocessor; `size` is S + 1. The shape alone decides the order of the sums."""
    block = 32
    tiles = -(-size // 32)
    limit = max(1, 528 // (tiles * (tiles + 1) // 2))
    blocks_per_chunk = max(1, -(-num_tokens // (block * limit)))
    chunks = max(1, -(-num_tokens // (block * blocks_per_chunk)))
    return Moments(block * blocks_per_chunk, chunks, block, 8, 32, 32)


class WeightScore(NamedTuple):
    block_words: int
    num_warps: int
    num_spans: int


def weight_score(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> WeightScore:
    """Choose `num_spans` programs that walk contiguous spans, eight to a multiprocessor so that loads overlap."""
    return WeightScore(block_words=32, num_warps=4, num_spans=min(8 * num_programs(device), MAX_SPANS))


class ScoreBins(NamedTuple):
    """A histogram in shared memory: mask words at a time, and programs that each add their bins to the result once."""

    block_words: int
    num_warps: int
    programs: int


def score_bins(device: torch.device) -> ScoreBins | None:
    """Choose the tiles for 2^15 bins in 128 KB, 32 sums a thread; None where a block may not use that much memory."""
    if tiles_of(architecture(device)) == 80 and architecture(device) not in (80, 87):
        return None
    return ScoreBins(block_words=128, num_warps=32, programs=num_programs(device))


class MatmulTile(NamedTuple):
    """One tile of a grouped product: `rows` x `columns` of the output, `depth` of the inner dimension at a time."""

    rows: int
    columns: int
    depth: int
    group: int
    persistent: bool
    descriptors: bool
    num_warps: int
    num_stages: int


class ExpertMLP(NamedTuple):
    """Tiles of `expert_mlp`; `activation` is for the gradient of the activation.

    `gate_up` counts its columns in activations: a gated tile multiplies twice as many. The epilogues of `gate_up` and
    `activation` take their columns in `gate_up_slices` and `activation_slices` slices.
    """

    gate_up: MatmulTile
    linear: MatmulTile
    activation: MatmulTile
    gate_up_slices: int
    activation_slices: int
    activation_registers: int | None
    weights_rows: int
    weights_hidden: int
    sum_columns: int


@functools.lru_cache
def expert_mlp(
    rows_per_expert: int, hidden: int, pairs: bool, dtype: torch.dtype, arch: int, aligned: bool
) -> ExpertMLP:
    """Choose the tiles of `expert_mlp`.

    pairs: gate and up alternate; aligned: descriptors can name both weights and the rows between them. Then each of
    two warp groups on sm_90 multiplies 64 x 256; the gradient of the activation needs registers for its epilogue.
    """
    arch = tiles_of(arch)
    rows = 128 if rows_per_expert > 64 else 64

    def tile(columns: int) -> MatmulTile:
        if arch >= 90 and aligned:
            return MatmulTile(rows, columns, 64, 8, True, True, 8, 4)
        return MatmulTile(rows, columns // 2, 32, 8, False, False, 8, 4)

    registers = None
    if dtype == torch.float32:  # multiplied by ordinary instructions: operands must fit in registers
        linear = activation = MatmulTile(64, 64, 16, 8, False, False, 8, 3)
        gate_up = linear._replace(columns=32)
    else:
        gate_up, linear, activation = tile(128), tile(256), tile(128 if arch < 100 else 64)
        if not activation.descriptors:
            registers = 192  # without a limit ptxas spills a few registers to fit two programs
    sum_columns = min(1024, 1 << (hidden - 1).bit_length())
    return ExpertMLP(gate_up, linear, activation, 2, 8 if pairs else 4, registers, 16, 256, sum_columns)


class OuterTile(NamedTuple):
    """One tile of `expert_wgrad`: `block_m` x `block_p` of a weight gradient, `block_rows` of its rows at a time.

    Each expert's rows are cut into `splits` parts.
    """

    block_m: int
    block_p: int
    block_rows: int
    group: int
    splits: int
    descriptors: bool
    num_warps: int
    num_stages: int
    max_registers: int | None


@functools.lru_cache
def expert_wgrad(
    epilogue: str,
    shape: tuple[int, int, int],
    rows_per_expert: int,
    gathered: bool,
    dtype: torch.dtype,
    arch: int,
    programs: int,
) -> OuterTile:
    """Choose the tile of `expert_wgrad`.

    epilogue: "store", "pair" (two gradients), "weights" (an update of weights alone, to the nearest), "state" (an
    update of weights and state, to the nearest) or "update" (any other); shape: [M_e, M, P] of a gradient; gathered:
    whether the rows of a factor are gathered.

    Only a store has registers to spare for 128 x 256, which reads least. An update with state waits for memory most of
    the time: with 64 x 128 two programs fit on a multiprocessor, and one multiplies while the other waits. Rows are
    split where the tiles do not fill the device twice and a part still has 1024 rows on average: fewer rows cost less
    than writing and reading partial sums.
    """
    arch = tiles_of(arch)
    stages = 5 if gathered else 3  # row numbers load two stages ahead, so that three blocks are in flight either way
    if dtype == torch.float32:  # multiplied by ordinary instructions: operands must fit in registers
        tile = OuterTile(64, 64, 16, 8, 1, False, 4, stages, None)
    else:
        hopper = arch >= 90
        block_p = 256 if hopper and epilogue == "store" else 128
        tile = OuterTile(128, block_p, 64 if hopper else 32, 8, 1, hopper, 8, stages, None)
        if epilogue in ("state", "update") or epilogue == "pair" and not hopper:
            tile = tile._replace(block_m=64)
        if epilogue == "state" and arch == 90:  # the limit for two programs, which Triton 3.6 exceeds if it may
            tile = tile._replace(max_registers=128)
    tiles = shape[0] * -(-shape[1] // tile.block_m) * -(-shape[2] // tile.block_p)
    splits = min(2 * programs // max(tiles, 1), rows_per_expert // 1024, 8)
    return tile._replace(splits=max(splits, 1)) if epilogue == "store" else tile


def packed_rows(num_warps: int) -> int:
    """Choose the rows of a slice of 64 columns: four elements a thread. With more, AdamW's packed moments spill."""
    return 2 * num_warps


def expert_wgrad_sum() -> tuple[int, int]:
    """Choose (rows of 32 columns, num_warps) of a program that adds up parts: 16 elements a thread."""
    return 64, 4


class TokenLoss(NamedTuple):
    """Tiles of `token_loss`: of the logits, and of the gradients of hidden states and head.

    A program of the forward folds `tiles_per_split` tiles of logits, each in `slices` of columns. `chunk` columns of
    dl/dz exist at a time, or what is kept of `kept_rows` rows. The gradient of the hidden states is cut into at
    least `split_tiles` tiles, but no chunk into more than `splits`, no kept rows into more than `kept_splits`. Pairs of
    `pair_tiles` tiles of logits become dl/dz in one program.
    """

    logits: MatmulTile
    grad_hidden: MatmulTile
    grad_head: MatmulTile
    slices: int
    tiles_per_split: int
    chunk: int
    kept_rows: int
    split_tiles: int
    splits: int
    kept_splits: int
    pair_tiles: int
    merge_rows: int
    merge_splits: int


def token_loss(
    num_rows: int,
    vocabulary: int,
    dtype: torch.dtype,
    arch: int,
    two_logits: bool,
    long_epilogue: bool,
    aligned: bool,
    keeps: bool = False,
) -> TokenLoss:
    """Choose the tiles of `token_loss`.

    two_logits: kl, whose tiles hold the logits of the reference too; long_epilogue: a soft cap or a bias; aligned: a
    descriptor can name the head; keeps: what `token_loss_kept` keeps of logits may be stored. A row of dl/dz takes
    32 KB, or less beyond 16,384 rows, so that dl/dz takes at most half a gigabyte. A chunk of 16,384 columns spends
    2 % of its time on reading and writing the sums it adds to. Kept rows take at most KEPT_BYTES, or are those of one
    tile. With these slices no supported compiler spills.
    """
    arch = tiles_of(arch)
    rows = 128 if num_rows > 64 else 64

    def tile(columns: int, described: bool) -> MatmulTile:
        if described:
            return MatmulTile(rows, columns, 64, 16, False, True, 8, 3)
        return MatmulTile(rows, columns // 2, 32, 16, False, False, 8, 4)

    if dtype == torch.float32:  # multiplied by ordinary instructions: operands must fit in registers
        grad_hidden = grad_head = MatmulTile(64, 64, 16, 8, False, False, 4, 3)
        logits = grad_hidden._replace(num_warps=4 if two_logits and not keeps else 8)
        slices = 1 if two_logits else 4
    else:
        # tanh, sums over rows or a second tile of logits leave registers for only half the columns
        narrow = two_logits or long_epilogue or (keeps and (arch != 90 or rows == 64))
        columns = 64 if keeps and arch >= 100 else 128 if narrow else 256
        logits = tile(columns, arch >= 90 and aligned)
        grad_hidden, grad_head = tile(256, arch >= 90 and aligned), tile(256, arch >= 90)
        slices = 2 if arch == 90 else 1
    row_tiles, column_tiles = -(-num_rows // logits.rows), -(-vocabulary // logits.columns)
    # many more programs than multiprocessors, since the programs of rows that do not count have nothing to do, and
    # kept rows have only a part of them at a time
    tiles_per_split = max(1, row_tiles * column_tiles // 16384)
    chunk = min(2**15 // dtype.itemsize, max(2**29 // (dtype.itemsize * num_rows), 1024))
    # a power of two, since kernels are compiled for each chunk and number of splits: five serve any number of rows
    chunk = 1 << (chunk.bit_length() - 1)
    chunk = -(-min(chunk, vocabulary) // logits.columns) * logits.columns
    fitting = KEPT_BYTES // ((1 + two_logits) * dtype.itemsize * column_tiles * logits.columns * logits.rows)
    kept_rows = logits.rows * max(1, min(fitting, row_tiles))
    splits, kept_splits = max(chunk // 1024, 1), max(vocabulary // 1024, 1)
    parts = {"split_tiles": 256, "splits": splits, "kept_splits": kept_splits, "pair_tiles": 8}
    parts |= {"merge_rows": 32, "merge_splits": 32}
    return TokenLoss(logits, grad_hidden, grad_head, slices, tiles_per_split, chunk, kept_rows, **parts)


class Gram(NamedTuple):
    """Tiles of `gram`: at most `programs`, each a block of mask words at a time; `sum_block` are summed at a time."""

    programs: int
    block_words: int
    num_warps: int
    sum_block: int


def gram() -> Gram:
    """Choose four elements of each set a thread: the ten float64 sums of products of four sets take 80 registers."""
    return Gram(1024, 16, 4, 1024)


class GramFactors(NamedTuple):
    rows: int
    depth: int
    num_warps: int
    num_stages: int
    sum_block: int


def gram_factors(sets: int) -> GramFactors:
    """Choose blocks of 32 rows, which waste little on experts with few; a tile of a pair of sets takes 16 registers."""
    return GramFactors(32, 32, 4, 3, 1024)
