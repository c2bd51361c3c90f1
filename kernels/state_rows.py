"""Hidden states against an anchor and against K cluster centres: by themselves, or inside the label row pass.

One program a row. The row is read once for each group of 16 centres, and once more for its length where the metric is
the cosine; all but the first of these reads come from cache. Distances are formed from differences, so that a state
that is almost its anchor keeps its digits; the cosine distance is half the squared difference of the unit vectors.

    reads  D (state) + D (anchor) + K D (centres, shared by all rows, in cache)      writes  3 numbers a row
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastforget_kernels.launching import UNSPECIALISED, Variant, interpreting, pointer, row_stride

BLOCK = 256  # of the state's width
GROUP = 16  # centres at a time
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def state_distances(
    hidden,  # pointers to this row's first element
    anchor,
    centres,  # (K, D) float32; of length 1 or 0 where the metric is the cosine
    width,
    centre_count,
    anchor_width,  # 0 where there is no anchor
    cosine,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """(distance from the anchor, distance from the nearest centre, its index) of one row."""
    hidden_square = 0.0
    anchor_square = 0.0
    if cosine != 0:
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            mask = columns < width
            state = tl.load(hidden + columns, mask=mask, other=0.0).to(tl.float32)
            point = tl.load(anchor + columns, mask=columns < anchor_width, other=0.0).to(tl.float32)
            hidden_square += tl.sum(state * state, 0)
            anchor_square += tl.sum(point * point, 0)
    hidden_factor = tl.where(cosine != 0, reciprocal(tl.sqrt(hidden_square)), 1.0)
    anchor_factor = tl.where(cosine != 0, reciprocal(tl.sqrt(anchor_square)), 1.0)

    from_anchor = 0.0
    pull = float("inf")
    nearest = 0
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
                point = tl.load(anchor + columns, mask=columns < anchor_width, other=0.0).to(tl.float32)
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
        index = group + tl.argmin(distances, 0)
        nearest = tl.where(smallest < pull, index, nearest)
        pull = tl.minimum(smallest, pull)
    undirected = hidden_factor * anchor_factor == 0.0
    distance = tl.where(cosine != 0, tl.where(undirected, 1.0, 0.5 * from_anchor), tl.sqrt(from_anchor))
    return distance, tl.where(all_distances == all_distances, pull, all_distances), nearest


@triton.jit
def reciprocal(value):
    """1 / value, and 0 for 0."""
    return tl.where(value > 0.0, 1.0 / tl.where(value > 0.0, value, 1.0), 0.0)


@triton.jit(do_not_specialize=UNSPECIALISED)
def state_rows_kernel(
    hidden,
    hidden_stride,
    anchor,
    anchor_stride,
    centres,
    values,  # (2, n) float32: distance, pull
    nearest,  # (n,) int64
    row_count,
    width,
    centre_count,
    anchor_width,
    cosine,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One row's distances."""
    row = tl.program_id(0).to(tl.int64)
    distance, pull, index = state_distances(
        hidden + row * hidden_stride,
        anchor + row * anchor_stride,
        centres,
        width,
        centre_count,
        anchor_width,
        cosine,
        BLOCK,
        GROUP,
    )
    tl.store(values + row, distance)
    tl.store(values + row_count + row, pull)
    tl.store(nearest + row, index.to(tl.int64))


def state_rows(hidden: Tensor, anchor: Tensor | None, centres: Tensor | None, metric: str) -> tuple[Tensor, Tensor]:
    """((2, n) float32: distance and pull, (n,) int64: the nearest centre) of hidden (n, D).

    anchor: (n, D) or one row (D,) that all share, float32; centres: as `prepared_centres` gives them.
    """
    count, width = hidden.shape
    values = torch.empty(2, count, dtype=torch.float32, device=hidden.device)
    nearest = torch.empty(count, dtype=torch.int64, device=hidden.device)
    if count:
        state_rows_kernel[(count,)](
            hidden,
            row_stride(hidden),
            *state_arguments(anchor, centres, values),
            values,
            nearest,
            count,
            width,
            0 if centres is None else len(centres),
            0 if anchor is None else width,
            int(metric == "cosine"),
            BLOCK=16 if interpreting() else BLOCK,
            GROUP=GROUP,
            num_warps=4,
        )
    return values, nearest


def state_arguments(anchor: Tensor | None, centres: Tensor | None, instead: Tensor) -> tuple[Tensor, int, Tensor]:
    """(anchor, its row stride, centres): `instead` (float32) stands for what is not there, and is not read."""
    return (
        pointer(anchor, instead),
        0 if anchor is None else row_stride(anchor),
        pointer(centres, instead),
    )


def prepared_centres(centres: Tensor, metric: str) -> Tensor:
    """Centres (K, D) as the kernel reads them: float32, and of length 1 for the cosine (0 where there is none)."""
    centres = centres.detach().float()
    if metric == "cosine":
        length = torch.linalg.vector_norm(centres, dim=1, keepdim=True)
        centres = centres / torch.where(length > 0, length, 1.0)
    return centres.contiguous()


def variants() -> list[Variant]:
    """Every configuration that `state_rows` can launch."""
    found = []
    for dtype in STATE_DTYPES:
        signature = {
            "hidden": dtype,
            "hidden_stride": "i64",
            "anchor": torch.float32,
            "anchor_stride": "i64",
            "centres": torch.float32,
            "values": torch.float32,
            "nearest": torch.int64,
            **dict.fromkeys(("row_count", "width", "centre_count", "anchor_width", "cosine"), "i32"),
        }
        found.append(
            Variant(
                state_rows_kernel,
                signature,
                {"BLOCK": BLOCK, "GROUP": GROUP},
                num_warps=4,
                traffic=f"{dtype.itemsize} D + 4 D read, 4 K D from cache",
            )
        )
    return found
