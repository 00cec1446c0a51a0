"""Code of both directions of `token_loss`: selects the rows that count and computes one tile of logits.

    _select_kernel   1 program: index [T], the rows that count, ascending; slot [T], each row's place in index or -1;
                     count, their number. The number stays on the device, so that grids are upper bounds; programs
                     behind it exit at once.
    _gather_kernel   grid (row blocks): these rows side by side in the dtype that is multiplied, then rows of zeros.
                     Moving a row once costs 1 / (2 V) of multiplying it, and makes it readable by descriptor.

The dtype that is multiplied is that of hidden states and heads if they share one, else float32.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_unlearn.triton_kernels import configs
from moe_unlearn.triton_kernels.common import ceil_div, dot, round_nearest

IGNORED = tl.constexpr(-100)
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


class Rows(NamedTuple):
    """The rows that count: `count` [1], `index` [T], `slot` [T], all int32; `hidden`, `ref_hidden` [T, H]."""

    count: Tensor
    index: Tensor
    slot: Tensor
    hidden: Tensor
    ref_hidden: Tensor | None


class Loss(NamedTuple):
    """What is computed of hidden states: heads [V, H], labels [T], bias [V], weights [T], and the formula."""

    head: Tensor
    ref_head: Tensor | None
    labels: Tensor
    bias: Tensor | None
    weights: Tensor | None
    kind: str
    scale: float
    softcap: float | None


def multiplied_dtype(hidden: Tensor, head: Tensor, ref_hidden: Tensor | None, ref_head: Tensor | None) -> torch.dtype:
    dtypes = {t.dtype for t in (hidden, head, ref_hidden, ref_head) if t is not None}
    if torch.float64 in dtypes:
        raise TypeError("the Triton kernels of token_loss have no float64; use impl='ref' for it")
    return hidden.dtype if len(dtypes) == 1 else torch.float32


def select_rows(
    hidden: Tensor, ref_hidden: Tensor | None, labels: Tensor, weights: Tensor | None, dtype: torch.dtype
) -> Rows:
    """Select the rows whose label is not IGNORED and whose weight is not 0; without weights labels decide. T >= 1."""
    num_rows = len(labels)
    count, index, slot = (torch.empty(n, dtype=torch.int32, device=hidden.device) for n in (1, num_rows, num_rows))
    _select_kernel[(1,)](
        labels,
        weights,
        count,
        index,
        slot,
        num_rows,
        labels.stride(0),
        0 if weights is None else weights.stride(0),
        BLOCK=1024,
        num_warps=8,
    )

    def gather(source: Tensor) -> Tensor:
        width = source.shape[1]
        # descriptors need rows at a distance that is a multiple of 16 bytes
        gathered = torch.empty(num_rows, ceil_div(width, 16) * 16, dtype=dtype, device=source.device)[:, :width]
        _gather_kernel[(ceil_div(num_rows, 16),)](
            source,
            index,
            count,
            gathered,
            num_rows,
            *source.stride(),
            gathered.stride(0),
            HIDDEN=width,
            ROWS=16,
            COLUMNS=128,
            num_warps=4,
        )
        return gathered

    return Rows(count, index, slot, gather(hidden), None if ref_hidden is None else gather(ref_hidden))


def choose_tiles(hidden: Tensor, loss: Loss, dtype: torch.dtype, keeps: bool = False) -> configs.TokenLoss:
    arch, aligned = configs.architecture(hidden.device), describable(loss.head, loss.ref_head)
    long_epilogue = loss.softcap is not None or loss.bias is not None
    return configs.token_loss(
        len(hidden), len(loss.head), dtype, arch, loss.kind == "kl", long_epilogue, aligned, keeps
    )


def operand(tensor: Tensor | None, block: list[int], described: bool) -> Tensor | TensorDescriptor | None:
    """Return `tensor` as `load_tile` takes it: by descriptor if `described`."""
    if tensor is None or not described:
        return tensor
    return TensorDescriptor(tensor, tensor.shape, tensor.stride(), block)


def describable(*tensors: Tensor | None) -> bool:
    """Return whether TMA descriptors can name all tensors: rows contiguous and 16-byte aligned."""

    def fits(t: Tensor) -> bool:
        aligned = t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0
        return aligned and t.stride(1) == 1 and t.stride(0) > 0 and t.numel() > 0

    return all(fits(t) for t in tensors if t is not None)


@triton.jit
def counts(labels, weights, row, inside, stride_label, stride_weight):
    """Return which of the rows that are `inside` count; without weights labels decide."""
    counted = tl.load(labels + row * stride_label, mask=inside, other=IGNORED) != IGNORED
    if weights is not None:
        counted = counted & (tl.load(weights + row * stride_weight, mask=inside, other=0.0).to(tl.float32) != 0)
    return counted


@triton.jit(do_not_specialize=["num_rows"])
def _select_kernel(labels, weights, count, index, slot, num_rows, stride_label, stride_weight, BLOCK: tl.constexpr):
    total = 0
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < num_rows
        counted = counts(labels, weights, row.to(tl.int64), inside, stride_label, stride_weight)
        position = total + tl.cumsum(counted.to(tl.int32), 0) - 1
        tl.store(slot + row, tl.where(counted, position, -1), mask=inside)
        tl.store(index + position, row, mask=counted)
        total += tl.sum(counted.to(tl.int32), 0)
    tl.store(count, total)


@triton.jit(do_not_specialize=["num_rows"])
def _gather_kernel(
    source,
    index,
    count,
    gathered,
    num_rows,
    stride_source_row,
    stride_source_column,
    stride_gathered_row,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < tl.load(count)
    token = tl.load(index + row, mask=live, other=0).to(tl.int64)
    for start in range(0, HIDDEN, COLUMNS):
        column = (start + tl.arange(0, COLUMNS)).to(tl.int64)
        inside = (column < HIDDEN)[None, :]
        place = source + token[:, None] * stride_source_row + column[None, :] * stride_source_column
        value = tl.load(place, mask=live[:, None] & inside, other=0.0)
        place = gathered + row.to(tl.int64)[:, None] * stride_gathered_row + column[None, :]
        tl.store(place, value.to(gathered.dtype.element_ty), mask=(row < num_rows)[:, None] & inside)


@triton.jit
def place(program, rows, columns, GROUP: tl.constexpr):
    """Return (row, column) of a program among rows * columns tiles; row = rows for a program behind the last tile.

    Programs walk down GROUP rows before the next column, so that the data that a wave of programs reads stay in L2.
    """
    first = program // (GROUP * columns) * GROUP
    within = program % (GROUP * columns)
    height = tl.maximum(tl.minimum(rows - first, GROUP), 1)
    column = within // height
    return tl.where((first < rows) & (column < columns), first + within % height, rows), column


@triton.jit
def load_tile(
    source,
    row,
    column,
    num_rows,
    num_columns,
    stride_row,
    stride_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """Load source[row : row + ROWS, column : column + COLUMNS], zero outside; source: descriptor or pointer."""
    if DESCRIPTOR:
        tile = source.load([row, column])
    else:
        r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        pointers = source + r[:, None].to(tl.int64) * stride_row + c[None, :].to(tl.int64) * stride_column
        tile = tl.load(pointers, mask=(r < num_rows)[:, None] & (c < num_columns)[None, :], other=0.0)
    return tile


@triton.jit
def store_tile(out, value, row, column, stride_row, DESCRIPTOR: tl.constexpr):
    """Round a tile and store it from out[row, column] on; out: descriptor or pointer, with room for all of it."""
    if DESCRIPTOR:
        out.store([row, column], round_nearest(value, out.dtype))
    else:
        r, c = row + tl.arange(0, value.shape[0]), column + tl.arange(0, value.shape[1])
        pointers = out + r[:, None].to(tl.int64) * stride_row + c[None, :]
        tl.store(pointers, round_nearest(value, out.dtype.element_ty))


@triton.jit
def logits(
    hidden, ref_hidden, head, ref_head, bias, row, column, num_rows, stride_hidden_row, stride_head_row,
    stride_head_column, stride_ref_head_row, stride_ref_head_column, stride_bias,
    VOCABULARY: tl.constexpr, HIDDEN: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Compute (z, z_ref) [ROWS, COLUMNS] float32 from (row, column) on, -infinity behind the vocabulary.

    z_ref has no meaning without `ref_hidden`. The same instructions compute both, so that equal rows have equal logits.
    """
    z = tl.zeros((ROWS, COLUMNS), tl.float32)
    z_ref = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, HIDDEN, DEPTH):
        h = load_tile(hidden, row, k, num_rows, HIDDEN, stride_hidden_row, 1, ROWS, DEPTH, DESCRIPTORS)
        w = load_tile(
            head, column, k, VOCABULARY, HIDDEN, stride_head_row, stride_head_column, COLUMNS, DEPTH, DESCRIPTORS
        )
        z = dot(h, w.to(h.dtype).T, z)
        if ref_hidden is not None:
            h = load_tile(ref_hidden, row, k, num_rows, HIDDEN, stride_hidden_row, 1, ROWS, DEPTH, DESCRIPTORS)
            if ref_head is not None:
                w = load_tile(
                    ref_head,
                    column,
                    k,
                    VOCABULARY,
                    HIDDEN,
                    stride_ref_head_row,
                    stride_ref_head_column,
                    COLUMNS,
                    DEPTH,
                    DESCRIPTORS,
                )
            z_ref = dot(h, w.to(h.dtype).T, z_ref)
    v = column + tl.arange(0, COLUMNS)
    inside = v < VOCABULARY
    offset = tl.zeros((COLUMNS,), tl.float32)
    if bias is not None:
        offset = tl.load(bias + v.to(tl.int64) * stride_bias, mask=inside, other=0.0).to(tl.float32)
    return _finish(z, offset, inside, SCALE, SOFTCAP), _finish(z_ref, offset, inside, SCALE, SOFTCAP)


@triton.jit
def _finish(z, offset, inside, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    z = capped((z + offset[None, :]) * SCALE, SOFTCAP)
    return tl.where(inside[None, :], z, -float("inf"))


@triton.jit
def capped(z, SOFTCAP: tl.constexpr):
    if SOFTCAP is not None:
        z = SOFTCAP * _tanh(z * (1 / SOFTCAP))
    return z


@triton.jit
def cap_slope(z, SOFTCAP: tl.constexpr):
    """Compute the derivative of the soft cap where its result is z: 1 - (z / SOFTCAP)^2, 0 for -infinity."""
    ratio = z * (1 / SOFTCAP)
    # z is -infinity behind the vocabulary, where what is multiplied is 0 and the product would be NaN
    return tl.where(z == -float("inf"), 0.0, 1 - ratio * ratio)


@triton.jit
def in_vocabulary(label, VOCABULARY: tl.constexpr):
    """Return labels in int32, which takes half the registers; -1 outside the vocabulary."""
    return tl.where((label >= 0) & (label < VOCABULARY), label, -1).to(tl.int32)


@triton.jit
def is_label(label, column, COLUMNS: tl.constexpr):
    """Compute [ROWS, COLUMNS]: whether a column, counted from `column` on, is its row's label."""
    return (label - column)[:, None] == tl.arange(0, COLUMNS)[None, :]


@triton.jit
def in_turn(slot, first, span):
    """Return which rows belong to the `span` slots from `first` on; those that do not count belong to the first."""
    slot = tl.maximum(slot, 0)
    return (slot >= first) & (slot < first + span)


@triton.jit
def _tanh(x):
    """Compute tanh(x) to 4 ulp, by a least-squares fit on [0, 0.6] and by the exponential beyond."""
    size = tl.abs(x)
    square = x * x
    small = ((-0.00627638759 * square + 0.021116214) * square - 0.0538751382) * square + 0.13332924
    small = x + x * (square * (small * square - 0.333333304))
    large = 1 - 2 / (tl.exp(2 * size) + 1)
    return tl.where(size < 0.6, small, tl.where(x < 0, -large, large))


@triton.jit
def log1p(x):
    """Compute log(1 + x) to 4 ulp: a factor corrects the logarithm for the rounding of 1 + x."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * tl.div_rn(x, tl.where(u == 1, 1.0, u - 1)))


@triton.jit
def expm1(x):
    """Compute exp(x) - 1 to 4 ulp for -16 <= x <= 1, with the same correction."""
    u = tl.exp(x)
    return tl.where(u == 1, x, (u - 1) * tl.div_rn(x, tl.where(u == 1, 1.0, tl.log(u))))
