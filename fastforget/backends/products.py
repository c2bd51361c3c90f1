"""The matrix products with tiles of the head, accumulated in float32 whatever the head's dtype.

A 16-bit head is never turned into a float32 copy as a whole. On a GPU the product itself returns float32
(`torch.mm(..., out_dtype=torch.float32)`) and adds onto float32; that operator is missing on the CPU, so there each
tile of the weight is cast, once for both products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastforget.backends.tiling import state_blocks
from fastforget.head import LMHead


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """float32, or float64 for float64 states: the dtype of logits, statistics and kept gradients."""
    return torch.promote_types(hidden.dtype, torch.float32)


def returns_float32(left: torch.dtype, weight: Tensor) -> bool:
    """Whether one product of two 16-bit operands can return float32."""
    return weight.is_cuda and left == weight.dtype and weight.dtype.itemsize == 2


def operand_dtype(hidden: Tensor, head: LMHead) -> torch.dtype:
    """The dtype of both operands of product 1; a tile of the weight is cast to it where it differs."""
    return hidden.dtype if returns_float32(hidden.dtype, head.weight) else compute_dtype(hidden)


def product(states: Tensor, weight: Tensor | None, out: Tensor | None) -> Tensor:
    """Product 1: `states @ weight.T` (r, c), in `out`, float32 (float64). Without a weight the states are logits."""
    if weight is None or out is None:
        return states
    if states.dtype == out.dtype:
        return torch.mm(states, weight.T, out=out)
    return torch.mm(states, weight.T, out_dtype=out.dtype, out=out)


def accumulate(rows: Tensor, weight: Tensor | None, out: Tensor, begin: bool) -> None:
    """Product 2: add `rows @ weight` (r, D) to `out`, float32 (float64), or begin it. Without a weight: the rows."""
    if weight is None:
        out.copy_(rows)
    elif rows.dtype == weight.dtype == out.dtype:
        if begin:
            torch.mm(rows, weight, out=out)
        else:
            out.addmm_(rows, weight)
    elif returns_float32(rows.dtype, weight):
        if begin:
            torch.mm(rows, weight, out_dtype=out.dtype, out=out)
        else:
            torch.addmm(out, rows, weight, out_dtype=out.dtype, out=out)
    else:
        accumulate(rows.to(out.dtype), weight.to(out.dtype), out, begin)


def add_head_rows(out: Tensor, index: Tensor, coefficient: Tensor, head: LMHead) -> None:
    """Add `coefficient * scale * W[index]` to `out` (n, D); index and coefficient are (n,)."""
    if head.is_identity:
        out.scatter_add_(1, index[:, None], coefficient.to(out.dtype)[:, None])
        return
    factor = (coefficient * head.scale).to(out.dtype)[:, None]
    for rows in state_blocks(len(out), out):
        out[rows].addcmul_(head.weight.detach().index_select(0, index[rows]).to(out.dtype), factor[rows])


def head_logit(head: LMHead, hidden: Tensor, index: Tensor) -> Tensor:
    """The (capped) logit (n,) of one token a row."""
    dtype = compute_dtype(hidden)
    if head.is_identity:
        return hidden.gather(1, index[:, None])[:, 0].to(dtype)
    logit = hidden.new_empty(len(hidden), dtype=dtype)
    for rows in state_blocks(len(hidden), hidden):
        part = head.weight.detach().index_select(0, index[rows]).to(dtype)
        torch.sum(part.mul_(hidden[rows]), dim=1, out=logit[rows])
    logit.mul_(head.scale)
    if head.bias is not None:
        logit = logit + head.bias.detach().index_select(0, index).to(dtype)
    return logit if head.softcap is None else torch.tanh(logit / head.softcap) * head.softcap


def label_slope(logit: Tensor, head: LMHead) -> Tensor:
    """d z / d (z before the softcap) at one token's logit z, (n,) float64; 1 without a softcap."""
    if head.softcap is None:
        return torch.ones_like(logit, dtype=torch.float64)
    return (1.0 - (logit.double() / head.softcap).square()).clamp(min=0.0)


def rows_contiguous(tensor: Tensor) -> Tensor:
    """The tensor with the elements of a row side by side, and no two rows over each other: so passes may read it."""
    if tensor.dim() != 2 or tensor.stride(1) != 1 or (tensor.stride(0) < tensor.shape[1] and len(tensor) > 1):
        return tensor.contiguous()
    return tensor
