"""The matrix products with the head, in bounded memory and with float32 accumulation whatever the head's dtype.

A 16-bit head is never turned into a float32 copy as a whole: on a GPU the product itself returns float32
(`torch.mm(..., out_dtype=torch.float32)`); that operator is missing on the CPU, so there the weight is cast in tiles of
vocabulary that fit a byte budget.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastforget.head import LMHead

CHUNK_BYTES = 112 * 2**20  # one logits buffer
DEVICE_CHUNK_BYTES = 128 * 2**20  # on a GPU, where fewer rows would leave the products short of work
ROW_TILE = 128  # rows that a GPU's product works on together: a chunk of 131 would cost it as much as one of 256
TILE_BYTES = 32 * 2**20  # one tile of a 16-bit weight, cast to float32
LOGIT_TILE_BYTES = 16 * 2**20  # one tile of logits, where rows are never whole: it stays in a large cache
LOGIT_TILE_ROWS = 2048  # at most: more are no faster
COLUMN_STEP = 64  # a tile of logits is so many columns, times a whole number
CPU_COLUMNS = 4096  # of logits at a time: MKL's product of 512 rows of 2048 with 50272 columns runs 4-7 % faster so


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """float32, or float64 for float64 states."""
    return torch.promote_types(hidden.dtype, torch.float32)


def chunk_rows(vocabulary: int, hidden: Tensor) -> int:
    """How many rows of logits fit the byte budget; at least one, and a multiple of ROW_TILE where that many fit."""
    budget = CHUNK_BYTES if hidden.is_cpu else DEVICE_CHUNK_BYTES
    rows = max(1, budget // (vocabulary * compute_dtype(hidden).itemsize))
    return rows // ROW_TILE * ROW_TILE if rows >= ROW_TILE and not hidden.is_cpu else rows


def even_rows(count: int, most: int, hidden: Tensor) -> int:
    """How many of `count` rows make chunks of much the same size, at most `most` rows each: a short one is slow."""
    chunks = max(1, -(-count // most))
    rows = -(-count // chunks)
    return rows if hidden.is_cpu or most < ROW_TILE else min(count, -(-rows // ROW_TILE) * ROW_TILE)


def logit_tile(count: int, weight: Tensor) -> tuple[int, int]:
    """(rows, columns) of the tiles of logits that `count` rows on the CPU go through, of much the same size."""
    rows = -(-count // max(1, -(-count // LOGIT_TILE_ROWS)))
    most = min(CPU_COLUMNS, LOGIT_TILE_BYTES // (max(rows, 1) * torch.float32.itemsize))
    if weight.dtype != torch.float32:
        most = min(most, TILE_BYTES // (weight.shape[1] * torch.float32.itemsize))
    columns = -(-len(weight) // max(1, -(-len(weight) // max(most, COLUMN_STEP))))
    return rows, -(-columns // COLUMN_STEP) * COLUMN_STEP


def row_chunks(row_count: int, rows: int) -> Iterator[slice]:
    """Slices of `rows` rows each, the last one perhaps shorter."""
    for start in range(0, row_count, rows):
        yield slice(start, min(start + rows, row_count))


def product_into(out: Tensor, hidden: Tensor, head: LMHead) -> None:
    """Write h @ W.T (n, V) of hidden (n, D) into `out`, float32 or float64; of an identity head, the logits."""
    if head.is_identity:
        out.copy_(hidden)
    elif returns_float32(hidden, head.weight):
        torch.mm(hidden, head.weight.T, out_dtype=out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        for columns, tile in weight_tiles(
            head.weight, out.dtype, CPU_COLUMNS if wide.is_cpu and len(out) >= 256 else None
        ):
            torch.mm(wide, tile.T, out=out[:, columns])


def finish_logits_(product: Tensor, head: LMHead) -> Tensor:
    """Logits from products with the head, in place: its scale, bias and softcap."""
    if head.scale != 1.0:
        product.mul_(head.scale)
    if head.bias is not None:
        product.add_(head.bias)
    if head.softcap is not None:
        product.div_(head.softcap).tanh_().mul_(head.softcap)
    return product


def log_softmax_(logits: Tensor) -> Tensor:
    """Log-probabilities in place, centred first: subtracting one large logsumexp would cost |z| times the precision."""
    logits.sub_(logits.amax(dim=1, keepdim=True))
    return logits.sub_(logits.exp().sum(dim=1, keepdim=True).log_())


def rows_to_hidden(rows: Tensor, head: LMHead, out: Tensor) -> None:
    """Write `scale * rows @ W` (n, D) into `out`: a gradient written over the logits becomes one over hidden states."""
    if head.is_identity:
        out.copy_(rows)
        return
    if returns_float32(rows, head.weight):
        torch.mm(rows, head.weight, out_dtype=out.dtype, out=out)
        if head.scale != 1.0:
            out.mul_(head.scale)
        return
    out.zero_()
    for columns, tile in weight_tiles(head.weight, out.dtype):
        out.addmm_(rows[:, columns].to(out.dtype), tile, alpha=head.scale)


def rows_to_weight(rows: Tensor, hidden: Tensor, head: LMHead, out: Tensor) -> None:
    """Add `scale * rows.T @ hidden` (V, D) to `out`: the gradient of a head that trains."""
    out.addmm_(rows.to(out.dtype).T, hidden.to(out.dtype), alpha=head.scale)


def softcap_slope(logits: Tensor, head: LMHead) -> Tensor | None:
    """d z / d (z before the cap) = 1 - (z / cap)^2; None where there is no cap."""
    return None if head.softcap is None else 1.0 - (logits / head.softcap).square()


def add_head_rows(out: Tensor, index: Tensor, coefficient: Tensor, head: LMHead) -> None:
    """Add `coefficient * scale * W[index]` to `out` (n, D); index and coefficient are (n,)."""
    if head.is_identity:
        out.scatter_add_(1, index[:, None], coefficient[:, None])
    else:
        out.addcmul_(head.weight[index].to(out.dtype), (coefficient * head.scale)[:, None])


def returns_float32(left: Tensor, weight: Tensor) -> bool:
    """True where one product of two 16-bit operands can return float32."""
    return left.is_cuda and left.dtype == weight.dtype and weight.dtype.itemsize == 2


def weight_tiles(weight: Tensor, dtype: torch.dtype, columns: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """(columns, weight tile in `dtype`), at most `columns` each; of a weight that has the dtype already, views."""
    step = len(weight) if weight.dtype == dtype else max(1, TILE_BYTES // (weight.shape[1] * dtype.itemsize))
    step = min(step, columns or step)
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step), weight[start : start + step].to(dtype)


def rows_contiguous(tensor: Tensor) -> Tensor:
    """The tensor with the elements of a row side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
