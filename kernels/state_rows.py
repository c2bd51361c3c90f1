"""Hidden states against an anchor and against K cluster centres: by themselves, or inside the label pass.

One program a row. The row is read once for each group of 16 centres, and once more for its length where the metric is
the cosine; all but the first of these reads come from cache. Distances are formed from differences, so that a state
that is almost its anchor keeps its digits; the cosine distance is half the squared difference of the unit vectors.

    reads  D (state) + D (anchor) + K D (centres, shared by all rows, in cache)      writes  3 numbers a row
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from fastforget_kernels.launching import Variant, block_size, tile_kernel


# fmt: off
@triton.jit
def measure_row(
    row, hidden, hidden_stride, anchor, anchor_stride, centres, values, values_stride, nearest, width, centre_count,
    anchor_width, cosine, STATE_BLOCK: tl.constexpr, GROUP: tl.constexpr,
):
# fmt: on
    """Write one row's distances, as far as there is an anchor and there are centres."""
    hidden += row * hidden_stride
    anchor += row * anchor_stride
    hidden_square = 0.0
    anchor_square = 0.0
    if cosine != 0:
        for start in range(0, width, STATE_BLOCK):
            columns = start + tl.arange(0, STATE_BLOCK)
            state = tl.load(hidden + columns, mask=columns < width, other=0.0).to(tl.float32)
            point = tl.load(anchor + columns, mask=columns < anchor_width, other=0.0)
            hidden_square += tl.sum(state * state, 0)
            anchor_square += tl.sum(point * point, 0)
    hidden_factor = tl.where(cosine != 0, reciprocal(tl.sqrt(hidden_square)), 1.0)
    anchor_factor = tl.where(cosine != 0, reciprocal(tl.sqrt(anchor_square)), 1.0)

    from_anchor = 0.0
    pull = float("inf")
    index = 0
    all_distances = 0.0  # is NaN where one of them is: the smallest would pass over it
    for group in range(0, tl.maximum(centre_count, 1), GROUP):  # once without centres too: for the anchor
        members = group + tl.arange(0, GROUP)
        present = members < centre_count
        from_centres = tl.zeros((GROUP,), tl.float32)
        lengths = tl.zeros((GROUP,), tl.float32)
        for start in range(0, width, STATE_BLOCK):
            columns = start + tl.arange(0, STATE_BLOCK)
            mask = columns < width
            state = tl.load(hidden + columns, mask=mask, other=0.0).to(tl.float32) * hidden_factor
            if group == 0:
                point = tl.load(anchor + columns, mask=columns < anchor_width, other=0.0)
                gap = state - point * anchor_factor
                from_anchor += tl.sum(gap * gap, 0)
            offsets = members[:, None].to(tl.int64) * width + columns[None, :]
            points = tl.load(centres + offsets, mask=present[:, None] & mask[None, :], other=0.0)
            gaps = state[None, :] - points
            from_centres += tl.sum(gaps * gaps, 1)
            lengths += tl.sum(points * points, 1)
        distances = closed(from_centres, hidden_factor * lengths == 0.0, cosine)
        all_distances += tl.sum(tl.where(present, distances, 0.0), 0)
        distances = tl.where(present & (distances == distances), distances, float("inf"))
        smallest = tl.min(distances, 0)
        index = tl.where(smallest < pull, group + tl.argmin(distances, 0), index)
        pull = tl.minimum(smallest, pull)
    distance = closed(from_anchor, hidden_factor * anchor_factor == 0.0, cosine)
    pull = tl.where(all_distances == all_distances, pull, all_distances)
    tl.store(values + row, distance, mask=anchor_width > 0)
    tl.store(values + values_stride.to(tl.int64) + row, pull, mask=centre_count > 0)
    tl.store(nearest + row, index.to(tl.int64), mask=centre_count > 0)  # type: ignore[attr-defined] # in a kernel 0 is a tensor


@triton.jit
def closed(square, undirected, cosine):
    """The distance of a sum of squares; cosine: 1 where a vector of length 0, or too large, has no direction."""
    # an infinite state is scaled with 0 too, which leaves NaN in the sum: its distance is that
    known = square == square
    return tl.where(cosine != 0, tl.where(undirected & known, 1.0, 0.5 * square), tl.sqrt(square))


@triton.jit
def reciprocal(value):
    """1 / value, 0 for 0, NaN for NaN."""
    return tl.where(value == 0.0, 0.0, 1.0 / tl.where(value == 0.0, 1.0, value))


# fmt: off
@tile_kernel
def state_rows_kernel(
    hidden, hidden_stride,
    anchor, anchor_stride,  # float32, of the stride 0 where all rows share one
    centres,  # (K, D) float32, contiguous; of length 1 or 0 where the metric is the cosine
    values, values_stride,  # (2, r) float32: distance, pull
    nearest,  # (r,) int64
    width, centre_count,
    anchor_width,  # 0 where there is no anchor
    cosine, STATE_BLOCK: tl.constexpr, GROUP: tl.constexpr,
):
    """One row's distances."""
    measure_row(
        tl.program_id(0).to(tl.int64), hidden, hidden_stride, anchor, anchor_stride, centres, values, values_stride,
        nearest, width, centre_count, anchor_width, cosine, STATE_BLOCK, GROUP,
    )
# fmt: on


@functools.cache
def options() -> dict[str, Any]:
    """What a launch is given, of this kernel and of those that measure states too: columns, and centres at a time."""
    return {"STATE_BLOCK": block_size(256, interpreted=16), "GROUP": 16, "num_warps": 8}


def variants() -> list[Variant]:
    """Every configuration that can be launched."""
    return [
        Variant(state_rows_kernel, options(), {"hidden": dtype}, f"{dtype.itemsize} D + 4 D read, 4 K D from cache")
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ]
