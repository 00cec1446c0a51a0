"""The only home of tile sizes: pure functions of shape, dtype and architecture.

`architecture` is the compute capability as one number: 80 (A100), 90 (H100, H200), 100 (B200). Others take the tiles of
the nearest of these that fit (`tiles_of`). On the CPU, where kernels run in the interpreter, it is 90 unless
MOE_UNLEARN_TRITON_ARCH says otherwise; the same variable lets a machine without a GPU compile for another one.
"""

import os
from typing import NamedTuple

import torch

ARCHITECTURES = (80, 90, 100)
_INTERPRETED_PROGRAMS = 3
MAX_SPANS = 2048


def architecture(device: torch.device) -> int:
    """The compute capability that kernels on `device` are compiled for."""
    assumed = os.environ.get("MOE_UNLEARN_TRITON_ARCH")
    if assumed:
        return int(assumed)
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tiles_of(arch: int) -> int:
    """Which of ARCHITECTURES has the tiles for `arch`.

    GeForce and workstation Blackwell (120, 121) multiply by Ampere's instructions from 99 KB of shared memory, in
    which Hopper's tiles do not fit; nor do they on Ada and the smaller Amperes (86, 89).
    """
    return 80 if arch >= 120 else max(known for known in ARCHITECTURES if known <= max(arch, 80))


def num_programs(device: torch.device) -> int:
    """How many programs a persistent kernel starts: one per multiprocessor, or a few in the interpreter."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


class MaskedUpdate(NamedTuple):
    block_words: int
    num_warps: int


def masked_update(shape: tuple[int, ...], dtype: torch.dtype, arch: int) -> MaskedUpdate:
    """Eight elements a thread: one 16-byte access to a bfloat16 tensor, two to its float32 moments."""
    return MaskedUpdate(block_words=32, num_warps=4)


class Route(NamedTuple):
    """Tiles of `route`, in rows; `chunk`: blocks whose counts a scatter program holds at a time, `cells`: elements
    of the histogram it sums at a time."""

    tokens_per_block: int
    blocks: int
    count_tile: int
    tile: int
    chunk: int
    cells: int
    num_warps: int


def route(num_tokens: int, top_k: int, num_experts: int) -> Route:
    """About one block per multiprocessor; each scatter program reads the counts of all of them."""
    # one row per thread: the comparison of all pairs costs a thread 128 registers
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
    """`block`: tokens a program weighs."""
    return RetainWeights(block=128, num_warps=4)


class Moments(NamedTuple):
    """`block`: tokens weighed at a time; a program of the second stage adds `sum_chunks` x `sum_block` at a time."""

    tokens_per_chunk: int
    chunks: int
    block: int
    num_warps: int
    sum_block: int
    sum_chunks: int


def moments(num_tokens: int, size: int) -> Moments:
    """About four programs per multiprocessor; `size`: S + 1. The order of the sums follows from the shape alone."""
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
    """num_spans: programs that walk contiguous spans, eight to a multiprocessor so that loads overlap."""
    return WeightScore(block_words=32, num_warps=4, num_spans=min(8 * num_programs(device), MAX_SPANS))


class ScoreBins(NamedTuple):
    """A histogram in shared memory: mask words at a time, and programs that each add their bins to the result once."""

    block_words: int
    num_warps: int
    programs: int


def score_bins(device: torch.device) -> ScoreBins | None:
    """For 2^15 bins, 128 KB, of which a thread holds the sums of 32; None where a block may not use that much."""
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
    """Tiles of `expert_mlp`. `gate_up` counts its columns in activations: a gated tile multiplies twice as many. The
    epilogues of `gate_up` and of `activation`, the gradient of the activation, run on so many slices of columns."""

    gate_up: MatmulTile
    linear: MatmulTile
    activation: MatmulTile
    gate_up_slices: int
    activation_slices: int
    activation_registers: int | None
    weights_rows: int
    weights_hidden: int
    sum_columns: int


def expert_mlp(
    rows_per_expert: int, hidden: int, pairs: bool, dtype: torch.dtype, arch: int, aligned: bool
) -> ExpertMLP:
    """pairs: gate and up alternate; aligned: descriptors can name both weights and the rows between them. On sm_90 each
    of two warp groups then multiplies 64 x 256; the gradient of the activation needs registers for its epilogue."""
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
            registers = 192  # left alone, ptxas spills a few to fit two programs
    sum_columns = min(1024, 1 << (hidden - 1).bit_length())
    return ExpertMLP(gate_up, linear, activation, 2, 8 if pairs else 4, registers, 16, 256, sum_columns)


class OuterTile(NamedTuple):
    """One tile of `expert_wgrad`: `block_m` x `block_p` of a weight gradient, `block_rows` of its rows at a time.
    `splits`: parts that each expert's rows are cut into."""

    block_m: int
    block_p: int
    block_rows: int
    group: int
    splits: int
    descriptors: bool
    num_warps: int
    num_stages: int
    max_registers: int | None


def expert_wgrad(
    epilogue: str, shape: tuple[int, int, int], rows_per_expert: int, gathered: bool, dtype: torch.dtype, arch: int,
    programs: int,
) -> OuterTile:  # fmt: skip
    """epilogue: "store", "pair" (two gradients), "weights" (an update of nothing else, to the nearest), "state" (an
    update of weights and state, to the nearest) or "update" (any other); shape: [M_e, M, P] of a gradient; gathered:
    whether rows of a factor are.

    Only a store has registers to spare for 128 x 256, which reads least. An update with state waits for memory most of
    the time: with 64 x 128, two programs fit on a multiprocessor, one multiplies while the other waits. Rows are split
    where the tiles do not fill the device twice and a part still has 1024 rows on average: fewer cost less than writing
    and reading partial sums.
    """
    arch = tiles_of(arch)
    stages = 5 if gathered else 3  # row numbers are loaded two stages ahead: three blocks in flight either way
    if dtype == torch.float32:  # multiplied by ordinary instructions: operands must fit in registers
        tile = OuterTile(64, 64, 16, 8, 1, False, 4, stages, None)
    else:
        hopper = arch >= 90
        block_p = 256 if hopper and epilogue == "store" else 128
        tile = OuterTile(128, block_p, 64 if hopper else 32, 8, 1, hopper, 8, stages, None)
        if epilogue in ("state", "update") or epilogue == "pair" and not hopper:
            tile = tile._replace(block_m=64)
        if epilogue == "state" and arch == 90:  # what two programs can have; Triton 3.6 takes a few more if allowed
            tile = tile._replace(max_registers=128)
    tiles = shape[0] * -(-shape[1] // tile.block_m) * -(-shape[2] // tile.block_p)
    splits = min(2 * programs // max(tiles, 1), rows_per_expert // 1024, 8)
    return tile._replace(splits=max(splits, 1)) if epilogue == "store" else tile


def expert_wgrad_sum() -> tuple[int, int]:
    """(rows of 32 columns, num_warps) of a program that adds up parts: 16 elements a thread."""
    return 64, 4


class TokenLoss(NamedTuple):
    """Tiles of `token_loss`: of the logits, and of the gradients of hidden states and head. `tiles_per_split`: tiles of
    logits that a program of the forward folds; `chunk`: columns of dl/dz that exist at a time; the gradient of the
    hidden states is cut into `split_tiles` tiles at least, but no chunk into more than `splits`."""

    logits: MatmulTile
    grad_hidden: MatmulTile
    grad_head: MatmulTile
    tiles_per_split: int
    chunk: int
    split_tiles: int
    splits: int
    merge_rows: int
    merge_splits: int


def token_loss(
    num_rows: int, vocabulary: int, dtype: torch.dtype, arch: int, two_logits: bool, long_epilogue: bool, aligned: bool
) -> TokenLoss:
    """two_logits: kl, whose tiles hold the logits of the reference too; long_epilogue: a soft cap or a bias; aligned: a
    descriptor can name the head. A row of dl/dz takes 32 KB, less beyond 16,384 rows: at most half a gigabyte then. A
    chunk of 16,384 columns spends 2 % of its time on the sums it adds to."""
    arch = tiles_of(arch)
    rows = 128 if num_rows > 64 else 64

    def tile(columns: int, described: bool) -> MatmulTile:
        if described:
            return MatmulTile(rows, columns, 64, 16, False, True, 8, 3)
        return MatmulTile(rows, columns // 2, 32, 16, False, False, 8, 4)

    if dtype == torch.float32:  # multiplied by ordinary instructions: operands must fit in registers
        grad_hidden = grad_head = MatmulTile(64, 64, 16, 8, False, False, 4, 3)
        logits = grad_hidden._replace(num_warps=4 if two_logits else 8)
    else:
        # tanh, sums over rows or a second tile of logits leave registers for half the columns
        logits = tile(128 if two_logits or long_epilogue else 256, arch >= 90 and aligned)
        grad_hidden, grad_head = tile(256, arch >= 90 and aligned), tile(256, arch >= 90)
    row_tiles, column_tiles = -(-num_rows // logits.rows), -(-vocabulary // logits.columns)
    # many more programs than multiprocessors: some rows do not count, and theirs have nothing to do
    tiles_per_split = max(1, row_tiles * column_tiles // 8192)
    chunk = min(2**15 // dtype.itemsize, max(2**29 // (dtype.itemsize * num_rows), 1024))
    # kernels are compiled for each chunk and number of splits: five of them are enough for any number of rows
    chunk = 1 << (chunk.bit_length() - 1)
    chunk = -(-min(chunk, vocabulary) // logits.columns) * logits.columns
    return TokenLoss(logits, grad_hidden, grad_head, tiles_per_split, chunk, 256, max(chunk // 1024, 1), 32, 32)


class Gram(NamedTuple):
    """`programs` of `gram` at most, each a block of mask words at a time; `sum_block`: programs summed at a time."""

    programs: int
    block_words: int
    num_warps: int
    sum_block: int


def gram() -> Gram:
    """Four elements of each set a thread: four sets make ten float64 sums of products, 80 registers of a thread."""
    return Gram(1024, 16, 4, 1024)


class GramFactors(NamedTuple):
    rows: int
    depth: int
    num_warps: int
    num_stages: int
    sum_block: int


def gram_factors(sets: int) -> GramFactors:
    """Experts have few rows: blocks of 32 waste little, and a float64 tile of 32 x 32 for each pair of sets takes 16
    registers."""
    return GramFactors(32, 32, 4, 3, 1024)
