"""Hidden states against an anchor and against K cluster centres: by themselves, or inside the label pass.

One program a row. The row is read once for each group of 16 centres, and once more for its length where the metric is
the cosine; all but the first of these reads come from cache. Distances are formed from differences, so that a state
that is almost its anchor keeps its digits; the cosine distance is half the squared difference of the unit vectors.

    reads  D (state) + D (anchor) + K D (centres, shared by all rows, in cache)      writes  3 numbers a row
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastforget_kernels.launching import UNALIGNED, UNSPECIALISED, Variant, block_size, signature

BLOCK = 256  # of the state's width
INTERPRETED_BLOCK = 16
GROUP = 16  # centres at a time
WARPS = 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# fmt: off
@triton.jit
def measure_row(
    row, hidden, hidden_stride, anchor, anchor_stride, centres, values, values_stride, nearest, width, centre_count,
    anchor_width, cosine, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):
# fmt: on
    """Write one row's distances, as far as there is an anchor and there are centres."""
    hidden += row * hidden_stride
    anchor += row * anchor_stride
    hidden_square = 0.0
    anchor_square = 0.0
    if cosine != 0:
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
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
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
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
        undirected = hidden_factor * lengths == 0.0  # a vector of length 0 has no direction: 1
        cosines = tl.where(undirected, 1.0, 0.5 * from_centres)
        distances = tl.where(cosine != 0, cosines, tl.sqrt(from_centres))
        all_distances += tl.sum(tl.where(present, distances, 0.0), 0)
        distances = tl.where(present & (distances == distances), distances, float("inf"))
        smallest = tl.min(distances, 0)
        index = tl.where(smallest < pull, group + tl.argmin(distances, 0), index)
        pull = tl.minimum(smallest, pull)
    undirected = hidden_factor * anchor_factor == 0.0
    distance = tl.where(cosine != 0, tl.where(undirected, 1.0, 0.5 * from_anchor), tl.sqrt(from_anchor))
    pull = tl.where(all_distances == all_distances, pull, all_distances)
    tl.store(values + row, distance, mask=anchor_width > 0)
    tl.store(values + values_stride.to(tl.int64) + row, pull, mask=centre_count > 0)
    tl.store(nearest + row, index.to(tl.int64), mask=centre_count > 0)


@triton.jit
def reciprocal(value):
    """1 / value, 0 for 0, NaN for NaN."""
    return tl.where(value == 0.0, 0.0, 1.0 / tl.where(value == 0.0, 1.0, value))


# fmt: off
@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNALIGNED)
def state_rows_kernel(
    hidden, hidden_stride,
    anchor,  # float32, of the stride 0 where all rows share one
    anchor_stride,
    centres,  # (K, D) float32, contiguous; of length 1 or 0 where the metric is the cosine
    values,  # (2, r) float32: distance, pull
    values_stride,
    nearest,  # (r,) int64
    width, centre_count,
    anchor_width,  # 0 where there is no anchor
    cosine, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):
# fmt: on
    """One row's distances."""
    # fmt: off
    measure_row(
        tl.program_id(0).to(tl.int64), hidden, hidden_stride, anchor, anchor_stride, centres, values, values_stride,
        nearest, width, centre_count, anchor_width, cosine, BLOCK, GROUP,
    )
    # fmt: on


class States(NamedTuple):
    """Hidden states (r, D) and what they are measured against."""

    hidden: Tensor  # rows contiguous
    anchor: Tensor | None  # (r, D) or (D,), float32, rows contiguous
    centres: Tensor | None  # (K, D) float32, contiguous
    cosine: bool
    values: Tensor  # (2, r) float32
    nearest: Tensor  # (r,) int64, contiguous

    def arguments(self) -> tuple[Any, ...]:
        """What the kernels take, from `hidden` to `nearest` and then from `width` to `cosine`."""
        hidden, anchor, centres, cosine, values, nearest = self
        width = hidden.shape[1]
        # fmt: off
        return (
            hidden, hidden.stride(0), values if anchor is None else anchor,
            0 if anchor is None or anchor.dim() == 1 else anchor.stride(0), values if centres is None else centres,
            values, values.stride(0), nearest, width, 0 if centres is None else centres.shape[0],
            0 if anchor is None else width, int(cosine),
        )
        # fmt: on


def state_rows(states: States) -> None:
    """Write the distances from the anchor and from the nearest centre, and which that is; what is not there is left."""
    state_rows_kernel[(states.hidden.shape[0],)](*states.arguments(), **options())


@functools.cache
def options() -> dict[str, Any]:
    """Constants of a launch."""
    return {**sizes(), "num_warps": WARPS}


def sizes() -> dict[str, int]:
    """Block sizes, of this kernel and of those that measure states too."""
    return {"BLOCK": block_size(BLOCK, INTERPRETED_BLOCK), "GROUP": GROUP}


def variants() -> list[Variant]:
    """Every configuration that `state_rows` can launch."""
    floats = dict.fromkeys(("anchor", "centres", "values"), torch.float32)
    return [
        Variant(
            state_rows_kernel,
            signature(state_rows_kernel, hidden=dtype, nearest=torch.int64, **floats),
            {"BLOCK": BLOCK, "GROUP": GROUP},
            WARPS,
            f"{dtype.itemsize} D + 4 D read, 4 K D from cache",
        )
        for dtype in DTYPES
    ]
