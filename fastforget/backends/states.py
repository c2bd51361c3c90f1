"""Hidden states against an anchor and against cluster centres, in plain torch: the hidden-state half of the row pass.

Distances are formed from differences, never from |h|^2 + |a|^2 - 2 h.a: at the start of every LoRA run a state is
almost its own reference, and the expanded form would return the rounding of |h|^2. For the same reason the cosine
distance is half the squared difference of the unit vectors. Where a distance is 0 its gradient is taken as 0 (the norm
has none there).

Nothing (n, D) is kept but the inputs: the gradient is a difference divided by a norm, formed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastforget.backends import gemm


def measure(
    hidden: Tensor, positions: Tensor | None, anchor: Tensor | None, centres: Tensor | None, metric: str
) -> dict[str, Tensor]:
    """`distance` (n,) of the kept rows of hidden (N, D) from the anchor, and `pull` from the `nearest` centre.

    anchor: (N, D), one for each row, or (D,); centres: (K, D); both constants, of any floating dtype.
    """
    fields = {}
    if anchor is not None:
        fields["distance"] = distances(hidden, positions, anchor, None, metric)
    if centres is not None:
        fields["nearest"] = nearest = nearest_centre(hidden, positions, centres, metric)
        fields["pull"] = distances(hidden, positions, centres, nearest, metric)
    return fields


def distances(hidden: Tensor, positions: Tensor | None, points: Tensor, index: Tensor | None, metric: str) -> Tensor:
    """(n,), the distance of each kept row from its own point, or from the one of `points` that `index` (n,) names."""
    dtype = gemm.compute_dtype(hidden)
    count = len(hidden if positions is None else positions)
    found = torch.empty(count, dtype=dtype, device=hidden.device)
    for rows in state_chunks(count, hidden):
        points_here = points_of(points, index, positions, rows).to(dtype)
        found[rows] = METRICS[metric](kept(hidden, positions, rows), points_here)[0]
    return found


def add_gradient(
    grad: Tensor,
    hidden: Tensor,
    positions: Tensor | None,
    points: Tensor,
    index: Tensor | None,
    metric: str,
    upstream: Tensor,
) -> None:
    """Add the gradient of `distances`, times the upstream gradient (n,), to `grad` (N, D)."""
    for rows in state_chunks(len(upstream), hidden):
        state = kept(hidden, positions, rows)
        points_here = points_of(points, index, positions, rows).to(state.dtype)
        part = METRICS[metric](state, points_here)[1] * upstream[rows, None]
        if positions is None:
            grad[rows] += part.to(grad.dtype)
        else:
            grad.index_add_(0, positions[rows], part.to(grad.dtype))


def state_chunks(count: int, hidden: Tensor) -> Iterator[slice]:
    """Slices of rows that fit the byte budget in float32."""
    return gemm.row_chunks(count, gemm.chunk_rows(hidden.shape[1], hidden))


def kept(hidden: Tensor, positions: Tensor | None, rows: slice) -> Tensor:
    """Some of the kept rows, in the dtype that is computed in."""
    part = hidden[rows] if positions is None else hidden.index_select(0, positions[rows])
    return part.to(gemm.compute_dtype(hidden))


def nearest_centre(hidden: Tensor, positions: Tensor | None, centres: Tensor, metric: str) -> Tensor:
    """(n,) int64, the centre at the smallest distance from each kept row."""
    dtype = gemm.compute_dtype(hidden)
    points = centres.to(dtype)
    points = unit_vectors(points)[0] if metric == "cosine" else points
    count = len(hidden if positions is None else positions)
    nearest = torch.empty(count, dtype=torch.long, device=hidden.device)
    for rows in state_chunks(count, hidden):
        chunk = kept(hidden, positions, rows)
        chunk = unit_vectors(chunk)[0] if metric == "cosine" else chunk
        between = torch.cdist(chunk, points, compute_mode="donot_use_mm_for_euclid_dist")
        nearest[rows] = between.argmin(dim=1)
    return nearest


def points_of(points: Tensor, index: Tensor | None, positions: Tensor | None, rows: slice) -> Tensor:
    """The points of some kept rows: (r, D), or (1, D) where one point is everybody's."""
    if index is not None:
        return points[index[rows]]
    if points.dim() == 1:
        return points[None]
    return points[rows] if positions is None else points.index_select(0, positions[rows])


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
