"""The second product of the `native` backend with the tiles of vocabulary left out that hardly weigh (`tail_mass`)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastforget.backends import gemm, library
from fastforget.backends.calls import DTYPES, call, check_rows, check_vector, common, pointer
from fastforget.backends.chunks import LabelPass
from fastforget.head import LMHead

GATHERED = 8192  # columns of rows that are gathered at a time
DENSE_SHARE = 2  # where more than one row in so many keeps more than one tile in so many, these rows keep all


def skipping_product(
    found: LabelPass, labels: Tensor, head: LMHead, weight: Tensor | None, tail_mass: float, out: Tensor
) -> Tensor:
    """The second product without the tiles that may be left out; returns the mass dropped of each row (n,).

    A row keeps a tile where the mass that it writes there, times `weight`, is not below tail_mass / tiles, or its label
    is there; so at most `tail_mass` is dropped of a token. Each tile then multiplies the rows that keep it. Where many
    rows keep many tiles, these rows keep all instead, and are gathered for a product with the whole head, which is
    faster at that.
    """
    assert found.masses is not None and found.row is not None
    rows, masses = found.row, found.masses
    count, tiles = masses.shape
    check_rows("tile masses", masses)
    check_vector("labels", labels, count, torch.int64)
    if weight is not None:
        check_vector("weights", weight, count, torch.float32)
    live = LiveTiles(masses, labels, weight, tail_mass / tiles, dense=tiles // DENSE_SHARE)
    if live.dense_count.value == count:
        gemm.rows_to_hidden(rows, head, out=out)
        return live.dropped
    if live.dense_count.value < count // DENSE_SHARE:
        live = LiveTiles(masses, labels, weight, tail_mass / tiles, dense=tiles)
    weights = gemm.rows_contiguous(head.weight.detach())
    check_rows("the head's weight", weights, DTYPES, (rows.shape[1], out.shape[1]))
    check_rows("written rows", rows)
    check_rows("the product", out.zero_(), shape=(count, out.shape[1]))
    call(
        "fastforget_tile_product",
        library.TileProduct(
            common(count, rows.shape[1], scale=head.scale),
            rows.data_ptr(),
            rows.stride(0),
            weights.data_ptr(),
            weights.stride(0),
            out.shape[1],
            tiles,
            ctypes.addressof(live.tile_rows),
            ctypes.addressof(live.tile_offsets),
            out.data_ptr(),
            out.stride(0),
            DTYPES.index(weights.dtype),
        ),
    )
    if live.dense_count.value:
        dense = torch.frombuffer(live.dense_rows, dtype=torch.int64)[: live.dense_count.value]
        total = out.new_zeros(len(dense), out.shape[1])
        for start in range(0, rows.shape[1], GATHERED):
            columns = slice(start, start + GATHERED)
            tile = head.weight[columns].to(out.dtype)
            total.addmm_(rows[:, columns].index_select(0, dense), tile, alpha=head.scale)
        out.index_copy_(0, dense, total)
    return live.dropped


class LiveTiles:
    """Which rows keep which tiles, in lists that the library fills; rows that keep more than `dense` keep all."""

    def __init__(self, masses: Tensor, labels: Tensor, weight: Tensor | None, limit: float, dense: int) -> None:
        count, tiles = masses.shape
        self.dropped = masses.new_empty(count)
        self.dense_rows, self.dense_count = (ctypes.c_int64 * max(count, 1))(), ctypes.c_int64()
        self.tile_rows = (ctypes.c_int64 * max(count * tiles, 1))()
        self.tile_offsets = (ctypes.c_int64 * (tiles + 1))()
        call(
            "fastforget_live_tiles",
            library.LiveTiles(
                count,
                tiles,
                masses.data_ptr(),
                labels.data_ptr(),
                pointer(weight),
                limit,
                dense,
                ctypes.addressof(self.dense_rows),
                ctypes.addressof(self.dense_count),
                ctypes.addressof(self.tile_rows),
                ctypes.addressof(self.tile_offsets),
                self.dropped.data_ptr(),
            ),
        )
