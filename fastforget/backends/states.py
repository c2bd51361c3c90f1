"""Hidden states against an anchor and against cluster centres, in plain torch: the hidden-state half of the row pass.

Distances are formed from differences, never from |h|^2 + |a|^2 - 2 h.a: at the start of every LoRA run a state is
almost its own reference, and the expanded form would return the rounding of |h|^2. For the same reason the cosine
distance is half the squared difference of the unit vectors. Where a distance is 0 its gradient is taken as 0 (the norm
has none there).

Nothing (n, D) is kept but the inputs: the gradient is a difference divided by a norm, formed in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastforget.backends import gemm


def state_stats(
    hidden: Tensor, anchor: Tensor | None, centres: Tensor | None, metric: str
) -> tuple[Tensor | None, Tensor | None]:
    """(distance (n,) from the anchor, pull (n,): distance from the nearest centre) of hidden (n, D).

    anchor: (n, D) or (D,); centres: (K, D); both constants, of any floating dtype. What was not given is None.
    """
    distance = None if anchor is None else Distance.apply(hidden, anchor.detach().expand_as(hidden), None, metric)
    pull = None
    if centres is not None:
        centres = centres.detach()
        pull = Distance.apply(hidden, centres, nearest_centre(hidden.detach(), centres, metric), metric)
    return distance, pull


def nearest_centre(hidden: Tensor, centres: Tensor, metric: str) -> Tensor:
    """(n,) int64, the centre at the smallest distance from each state."""
    dtype = gemm.compute_dtype(hidden)
    points = centres.to(dtype)
    points = unit_vectors(points)[0] if metric == "cosine" else points
    nearest = torch.empty(len(hidden), dtype=torch.long, device=hidden.device)
    for rows in gemm.row_chunks(len(hidden), hidden.shape[1], dtype):
        chunk = hidden[rows].to(dtype)
        chunk = unit_vectors(chunk)[0] if metric == "cosine" else chunk
        between = torch.cdist(chunk, points, compute_mode="donot_use_mm_for_euclid_dist")
        nearest[rows] = between.argmin(dim=1)
    return nearest


class Distance(torch.autograd.Function):
    """Distance (n,) of each state from its own point: row by row of (n, D), or the row that `index` (n,) names."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, points: Tensor, index: Tensor | None, metric: str) -> Tensor:
        dtype = gemm.compute_dtype(hidden)
        distance = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        for rows in gemm.row_chunks(len(hidden), hidden.shape[1], dtype):
            distance[rows] = METRICS[metric](hidden[rows].to(dtype), points_of(points, index, rows).to(dtype))[0]
        ctx.metric = metric
        ctx.save_for_backward(hidden, points, index)
        return distance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        hidden, points, index = ctx.saved_tensors
        dtype = upstream.dtype
        grad = torch.empty_like(hidden)
        for rows in gemm.row_chunks(len(hidden), hidden.shape[1], dtype):
            direction = METRICS[ctx.metric](hidden[rows].to(dtype), points_of(points, index, rows).to(dtype))[1]
            grad[rows] = (direction * upstream[rows, None]).to(grad.dtype)
        return grad, None, None, None


def points_of(points: Tensor, index: Tensor | None, rows: slice) -> Tensor:
    """The points of some rows, (r, D)."""
    return points[rows] if index is None else points[index[rows]]


def l2_rows(hidden: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """|h - a| (r,) and its gradient (h - a) / |h - a| (r, D)."""
    difference = hidden - points
    distance = torch.linalg.vector_norm(difference, dim=1)
    return distance, difference * reciprocal(distance)[:, None]


def cosine_rows(hidden: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """1 - cos(h, a) (r,) and its gradient (r, D); 1 with no gradient where h or a is 0, which has no direction."""
    unit, length = unit_vectors(hidden)
    other, other_length = unit_vectors(points)
    difference = unit - other
    defined = (length > 0) & (other_length > 0)
    distance = torch.where(defined, 0.5 * difference.square().sum(dim=1), 1.0)
    direction = (difference - distance[:, None] * unit) * reciprocal(length)[:, None]
    return distance, torch.where(defined[:, None], direction, 0.0)


METRICS = {"l2": l2_rows, "cosine": cosine_rows}


def unit_vectors(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """(vectors / length, length); a vector of length 0 stays 0."""
    length = torch.linalg.vector_norm(vectors, dim=1)
    return vectors * reciprocal(length)[:, None], length


def reciprocal(value: Tensor) -> Tensor:
    """1 / value, and 0 for 0."""
    return torch.where(value > 0, 1.0 / value, 0.0)
