"""The second product without the tiles of vocabulary that provably do not matter: a block-sparse GEMM.

A tile (TILE tokens) is left out for a block of rows only where, for each row, the mass of the written row over
it, sum of |g_v|, is below tail_mass / tiles: so at most `tail_mass` is dropped of a token. A label's tile is never left
out. Which tiles are live is decided on the device (an argsort puts them in front), so nothing synchronises; a program
then loops over its row block's live tiles only.

    reads  the live tiles of rows (M x V) and weight (V x D)        writes  M x D float32

Where every tile is live this is a plain GEMM, slower than the library's: `tail_mass` is for memorised text.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastforget_kernels.label_rows import INTERPRETED_TILE, TILE
from fastforget_kernels.launching import UNSPECIALISED, Variant, interpreting, row_stride

ROWS = 64  # of a block: more share the weight's tiles, fewer have more tiles to leave out
COLUMNS = 128
WARPS = 8


@triton.jit(do_not_specialize=UNSPECIALISED)
def skipping_product_kernel(
    rows,
    rows_stride,
    weight,
    weight_stride,
    tiles,  # (blocks, tile_count) int32: live tiles in front
    live_counts,  # (blocks,) int32
    out,
    out_stride,
    row_count,
    vocabulary,
    width,
    tile_count,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program a (block of rows, block of hidden columns)."""
    block = tl.program_id(0).to(tl.int64)
    members = block * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = members < row_count
    within = columns < width
    accumulator = tl.zeros((ROWS, COLUMNS), tl.float32)
    steps = tl.load(live_counts + block) * (TILE // DEPTH)
    for step in range(steps):
        tile = tl.load(tiles + block * tile_count + step // (TILE // DEPTH))
        tokens = tile.to(tl.int64) * TILE + (step % (TILE // DEPTH)) * DEPTH + tl.arange(0, DEPTH)
        known = tokens < vocabulary
        left = tl.load(
            rows + members[:, None] * rows_stride + tokens[None, :], mask=inside[:, None] & known[None, :], other=0.0
        )
        right = tl.load(
            weight + tokens[:, None] * weight_stride + columns[None, :],
            mask=known[:, None] & within[None, :],
            other=0.0,
        )
        accumulator = tl.dot(left, right, accumulator, input_precision="ieee")
    targets = out + members[:, None] * out_stride + columns[None, :]
    tl.store(targets, accumulator * scale, mask=inside[:, None] & within[None, :])


def skipping_product(
    rows: Tensor,
    weight: Tensor,
    masses: Tensor,
    labels: Tensor,
    factor: Tensor | None,
    tail_mass: float,
    *,
    scale: float = 1.0,
    out: Tensor,
) -> Tensor:
    """Write `scale * rows @ weight` without its harmless tiles into `out`; returns the mass dropped of each row (n,).

    Args:
        rows: (n, V) written rows, in the dtype of `weight` (V, D); a float16 row may be scaled, its masses are not.
        masses: (n, tiles) float32, from `label_rows(masses=True)`.
        labels: (n,) int64.
        factor: (n,) what the row will be multiplied with in the gradient; its masses count times that. None: 1.
    """
    count, vocabulary = rows.shape
    width = weight.shape[1]
    tile = INTERPRETED_TILE if interpreting() else TILE
    block_rows, columns, depth = (16, 16, 16) if interpreting() else (ROWS, COLUMNS, depth_of(rows.dtype))
    if factor is not None:
        masses = masses * factor[:, None]
    tile_count = masses.shape[1]
    needed = ~(masses < tail_mass / tile_count)  # NaN is needed
    needed.scatter_(1, (labels // tile)[:, None], True)
    blocks = triton.cdiv(count, block_rows)
    padded = torch.zeros(blocks * block_rows, tile_count, dtype=torch.bool, device=rows.device)
    padded[:count] = needed
    live = padded.view(blocks, block_rows, tile_count).any(dim=1)
    tiles = torch.argsort(~live, dim=1, stable=True).to(torch.int32)
    live_counts = live.sum(dim=1, dtype=torch.int32)
    skipping_product_kernel[(blocks, triton.cdiv(width, columns))](
        rows,
        row_stride(rows),
        weight,
        row_stride(weight),
        tiles,
        live_counts,
        out,
        row_stride(out),
        count,
        vocabulary,
        width,
        tile_count,
        scale,
        ROWS=block_rows,
        COLUMNS=columns,
        DEPTH=depth,
        TILE=tile,
        num_warps=WARPS,
        num_stages=stages(rows.dtype),
    )
    skipped = ~live.repeat_interleave(block_rows, dim=0)[:count]
    return torch.where(skipped, masses, 0.0).sum(dim=1)


def depth_of(dtype: torch.dtype) -> int:
    """Tokens at a time; divides TILE. float32 has no tensor cores here: with 64, sm_80 runs out of registers."""
    return 32 if dtype == torch.float32 else 64


def stages(dtype: torch.dtype) -> int:
    """Pipeline depth: two float32 stages already take the shared memory of the smaller chips."""
    return 2 if dtype == torch.float32 else 3


def variants() -> list[Variant]:
    """Every configuration that `skipping_product` can launch."""
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        constants = {"ROWS": ROWS, "COLUMNS": COLUMNS, "DEPTH": depth_of(dtype), "TILE": TILE}
        kinds: dict[str, torch.dtype | str] = {
            **dict.fromkeys(("rows", "weight"), dtype),
            **dict.fromkeys(("tiles", "live_counts"), torch.int32),
            "out": torch.float32,
            **dict.fromkeys(("rows_stride", "weight_stride", "out_stride"), "i64"),
            **dict.fromkeys(("row_count", "vocabulary", "width", "tile_count"), "i32"),
            "scale": "fp32",
        }
        traffic = f"{dtype.itemsize} V of its live tiles read, {dtype.itemsize} V D / {ROWS} of the weight"
        found.append(Variant(skipping_product_kernel, kinds, constants, WARPS, stages(dtype), traffic))
    return found
