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

CHUNK_BYTES = 64 * 2**20  # one logits buffer
TILE_BYTES = 32 * 2**20  # one tile of a 16-bit weight, cast to float32


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """float32, or float64 for float64 states."""
    return torch.promote_types(hidden.dtype, torch.float32)


def row_chunks(row_count: int, vocabulary: int, dtype: torch.dtype) -> Iterator[slice]:
    """Slices of rows whose (rows, V) buffer fits CHUNK_BYTES; at least one row each."""
    step = max(1, CHUNK_BYTES // (vocabulary * dtype.itemsize))
    for start in range(0, row_count, step):
        yield slice(start, min(start + step, row_count))


def chunk_buffer(row_count: int, vocabulary: int, hidden: Tensor) -> Tensor:
    """One buffer for all chunks of `row_chunks`."""
    dtype = compute_dtype(hidden)
    rows = min(row_count, max(1, CHUNK_BYTES // (vocabulary * dtype.itemsize)))
    return torch.empty(rows, vocabulary, dtype=dtype, device=hidden.device)


def logits_into(out: Tensor, hidden: Tensor, head: LMHead) -> None:
    """Write the logits (n, V) of hidden (n, D) into `out`, float32 or float64."""
    if head.is_identity:
        out.copy_(hidden)
        return
    if returns_float32(hidden, head.weight):
        torch.mm(hidden, head.weight.T, out_dtype=out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        for columns, tile in weight_tiles(head.weight, out.dtype):
            torch.mm(wide, tile.T, out=out[:, columns])
    if head.scale != 1.0:
        out.mul_(head.scale)
    if head.bias is not None:
        out.add_(head.bias)
    if head.softcap is not None:
        out.div_(head.softcap).tanh_().mul_(head.softcap)


def log_softmax_(logits: Tensor) -> Tensor:
    """Log-probabilities in place, centred first: subtracting one large logsumexp would cost |z| times the precision."""
    logits.sub_(logits.amax(dim=1, keepdim=True))
    return logits.sub_(logits.exp().sum(dim=1, keepdim=True).log_())


def rows_to_hidden(rows: Tensor, head: LMHead, out: Tensor) -> None:
    """Write `scale * rows @ W` (n, D) into `out`: a gradient written over the logits becomes one over hidden states."""
    if head.is_identity:
        out.copy_(rows)
        return
    out.zero_()
    for columns, tile in weight_tiles(head.weight, rows.dtype):
        out.addmm_(rows[:, columns], tile, alpha=head.scale)


def rows_to_weight(rows: Tensor, hidden: Tensor, head: LMHead, out: Tensor) -> None:
    """Add `scale * rows.T @ hidden` (V, D) to `out`: the gradient of a head that trains."""
    out.addmm_(rows.T, hidden.to(rows.dtype), alpha=head.scale)


def softcap_slope(logits: Tensor, head: LMHead) -> Tensor | None:
    """d z / d (z before the cap) = 1 - (z / cap)^2; None where there is no cap."""
    return None if head.softcap is None else 1.0 - (logits / head.softcap).square()


def add_head_rows(out: Tensor, index: Tensor, coefficient: Tensor, head: LMHead) -> None:
    """Add `coefficient * scale * W[index]` to `out` (n, D); index and coefficient are (n,)."""
    if head.is_identity:
        out.scatter_add_(1, index[:, None], coefficient[:, None])
    else:
        out.addcmul_(head.weight[index].to(out.dtype), (coefficient * head.scale)[:, None])


def returns_float32(hidden: Tensor, weight: Tensor) -> bool:
    """True where one product of two 16-bit operands can return float32."""
    return hidden.is_cuda and hidden.dtype == weight.dtype and weight.dtype.itemsize == 2


def weight_tiles(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(columns, weight tile in `dtype`): the weight itself where it has that dtype already."""
    if weight.dtype == dtype:
        yield slice(None), weight
        return
    step = max(1, TILE_BYTES // (weight.shape[1] * dtype.itemsize))
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step), weight[start : start + step].to(dtype)
