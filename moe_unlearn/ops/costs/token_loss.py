"""Costs of `token_loss`: products of hidden states and head, and the tiles of logits that its kernels hold.

Without values of the labels all rows count. The CPU kernels' tiles are the library's own (`native.token_loss_tiles`):
they are asked for only where that implementation runs, so that a plan needs no library.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from moe_unlearn import native
from moe_unlearn.ops.costs.cost import Cost
from moe_unlearn.ops.token_loss import _DEFAULT_ROWS, _TEMPORARIES, IGNORED, TILED_KINDS, WORKSPACE_BYTES, kept_part
from moe_unlearn.triton_kernels import configs


def flops(rows: int, head: int, products: float) -> float:
    """Count the operations of so many products of `rows` rows with a head of `head` elements."""
    return 2 * rows * head * products


def bytes_moved(head: int, element: int, *, trains: bool) -> int:
    """Return the least bytes that loss and gradients move.

    The head is read forward and backward, and its gradient written where it trains; rows are few beside it.
    """
    return element * head * (3 if trains else 2)


def _forward_flops(
    *,
    impl: str,
    hidden: Tensor,
    labels: Tensor,
    head: Tensor,
    ref_hidden: Tensor | None,
    kind: str,
    keep: bool,
    **_: object,
) -> float:
    kept = kept_part(hidden, head, impl, kind, keep, False)
    return flops(_counted_rows(labels), head.numel(), _sides(ref_hidden) + bool(kept))


def _backward_flops(
    *,
    labels: Tensor,
    head: Tensor,
    ref_hidden: Tensor | None,
    direction: Tensor,
    kind: str,
    softcap: float | None,
    needs_head: bool,
    needs_hidden: bool,
    **_: object,
) -> float:
    # the slope of a logit margin needs the logits only where there is a softcap
    logits = 0 if kind == "logit_margin" and softcap is None else _sides(ref_hidden)
    kept = direction.numel() > 0
    products = (logits if needs_head or not kept else 0) + needs_head + (needs_hidden and not kept)
    return flops(_counted_rows(labels), head.numel(), products)


def _head_flops(*, hidden: Tensor, head: Tensor, labels: Tensor, spare: Tensor, needs_head: bool, **_: object) -> float:
    rows, group = _counted_rows(labels), min(native.token_loss_tiles().entries, len(head))
    # one kept row of a tile spans all tokens, in float32 unless products take pairs
    tile_row = math.ceil(rows / 32) * 32 * (2 if _pairs(hidden, head) else 4)
    kept = (group * head.shape[1] + spare.shape[1] * spare.shape[2]) * head.itemsize / group
    again = max(0.0, 1 - kept / max(tile_row, 1))
    return flops(rows, head.numel(), needs_head + again)


def _product(*, labels: Tensor, head: Tensor, **_: object) -> float:
    return flops(_counted_rows(labels), head.numel(), 1)


def _forward_space(
    *,
    impl: str,
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    kind: str,
    softcap: float | None,
    keep: bool,
    **_: object,
) -> int:
    """Return the workspace of the forward in bytes.

    It holds tiles of logits, copies of hidden states, and copies of head entries where the head is not float32.
    """
    rows, (vocabulary, width), sides = _counted_rows(labels), head.shape, _sides(ref_hidden)
    impl = "ref" if kind in TILED_KINDS else impl
    if impl == "triton":
        kept = kept_part(hidden, head, impl, kind, keep, False)
        gathered = sides * len(labels) * width * hidden.itemsize
        return gathered + bool(kept) * _kept_space(hidden, head, sides, long=softcap is not None or bias is not None)
    if impl == "ref":
        return _tiled_space(rows, vocabulary, width, sides)
    tile, dense = native.token_loss_tiles(), not _pairs(hidden, head)
    copied = 0 if head.dtype == torch.float32 else tile.entries
    keys = dense * sides * (tile.tokens + copied) * width + (1 + dense) * bool(keep) * tile.tokens * width
    tasks = min(torch.get_num_threads(), max(1, math.ceil(rows / tile.tokens)))
    return 4 * tasks * (keys + sides * tile.entries * tile.tokens) + 8 * rows


def _kept_space(hidden: Tensor, head: Tensor, sides: int, *, long: bool) -> int:
    """Return the bytes that Triton's kernels take to keep dl/dh beside the gathered rows; long: a softcap or a bias.

    They are exponentials of some rows, or for kl pairs and the two largest logits of each tile; sums of their products;
    and three numbers of each split of the vocabulary, for kl five.
    """
    (tokens, width), vocabulary = hidden.shape, len(head)
    dtype = hidden.dtype if hidden.dtype == head.dtype else torch.float32
    # as on sm_90, whose tiles take about as much as the others'
    tiles = configs.token_loss(tokens, vocabulary, dtype, 90, sides == 2, long, True, True)
    columns = -(-vocabulary // tiles.logits.columns)
    splits = -(-columns // tiles.tiles_per_split)
    row = sides * dtype.itemsize * columns * tiles.logits.columns + (12 if sides == 1 else 20) * splits
    row += 0 if sides == 1 else 8 * columns
    sums = tiles.grad_hidden
    parts = -(-tiles.kept_rows // sums.rows) * -(-width // sums.columns)
    parts = max(parts, min(parts * tiles.kept_splits, tiles.split_tiles))
    space: int = tiles.kept_rows * row + 4 * parts * sums.rows * sums.columns
    return space


def _backward_space(
    *,
    impl: str,
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    ref_hidden: Tensor | None,
    direction: Tensor,
    kind: str,
    needs_hidden: bool,
    **others: Any,
) -> int:
    """Return the workspace of the backward in bytes; it has the hidden states' gradient in float32."""
    rows, (vocabulary, width), sides = _counted_rows(labels), head.shape, _sides(ref_hidden)
    tokens, impl = len(labels), "ref" if kind in TILED_KINDS else impl
    if impl == "triton":
        sums = needs_hidden and not direction.numel()
        if not (sums or others["needs_head"] or others["needs_bias"]):
            return 0
        gathered = sides * tokens * width * hidden.itemsize
        # a row of dl/dz takes 32 KiB, less from 16,384 tokens on, and never more than the whole vocabulary
        row = min(2**15, max(2**29 // max(tokens, 1), 1024 * hidden.itemsize), vocabulary * hidden.itemsize)
        return gathered + sums * 4 * tokens * width + tokens * row
    if impl == "ref":
        return _tiled_space(rows, vocabulary, width, sides) + 4 * rows * width
    space = 0 if hidden.dtype == torch.float32 else 4 * hidden.numel()
    of_head = _head_space(hidden=hidden, head=head, labels=labels, ref_hidden=ref_hidden, **others)
    return max(space + 8 * rows + 4 * tokens, of_head)


def _head_space(
    *,
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    needs_head: bool,
    needs_bias: bool,
    ref_hidden: Tensor | None = None,
    **_: object,
) -> int:
    """Return the workspace for the head's gradient in bytes: tiles of logits, sums, and copies as in the forward."""
    rows, (vocabulary, width), sides = _counted_rows(labels), head.shape, _sides(ref_hidden)
    if not (needs_head or needs_bias):
        return 0
    tile, dense = native.token_loss_tiles(), not _pairs(hidden, head)
    copied = 0 if head.dtype == torch.float32 else dense * tile.backward_entries
    floats = sides * (copied * width + tile.backward_entries * tile.backward_tokens)
    floats += needs_head * (1 + dense) * tile.backward_entries * width
    tasks = min(torch.get_num_threads(), math.ceil(vocabulary / tile.entries))
    return 4 * (tasks * floats + dense * sides * rows * width) + 8 * rows + 4 * len(labels)


def _tiled_space(rows: int, vocabulary: int, hidden: int, sides: int) -> int:
    tile = min(WORKSPACE_BYTES // _TEMPORARIES, 4 * min(rows, _DEFAULT_ROWS) * vocabulary)
    return (1 + 2 * sides) * tile + 4 * hidden * (sides * rows + vocabulary)


def _counted_rows(labels: Tensor) -> int:
    """Count the rows for which a loss computes logits; all rows where the labels are fakes without values."""
    return len(labels) if isinstance(labels, FakeTensor) else int((labels != IGNORED).sum())


def _sides(ref_hidden: Tensor | None) -> int:
    """Return the number of sets of logits: the model's, and a reference's if there is one."""
    return 1 if ref_hidden is None else 2


def _pairs(hidden: Tensor, head: Tensor) -> bool:
    """Return whether products take bfloat16 in pairs, whose operands are packed outside of torch's allocator."""
    narrow = hidden.dtype == head.dtype == torch.bfloat16
    return narrow and hidden.shape[1] % 32 == 0 and native.has_pair_products()


COSTS = {
    "token_loss": Cost(_forward_flops, _forward_space, "token_loss", _product),
    "token_loss_backward": Cost(_backward_flops, _backward_space, "token_loss.backward", _product),
    "token_loss_head_": Cost(_head_flops, _head_space, product=_product),
}
