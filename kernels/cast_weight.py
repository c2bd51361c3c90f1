"""int8 codes of a frozen weight, times a factor a row, in the dtype that a product takes.

One program a row and block of its columns: 16 codes a thread, which it reads in one access. Bound by memory: 3
bytes a weight for a 16-bit product. Measured nowhere yet; the arithmetic says 7 ms for 8B weights on an H100.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastforget_kernels.launching import Variant, block_size, tile_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# fmt: off
@tile_kernel
def cast_weight_kernel(
    codes,  # (rows, width) int8, contiguous
    width_stride,  # the width: between rows, of codes and of out
    scale,  # (rows,) float32: the value of code 127
    out,  # (rows, width), contiguous
    BLOCK: tl.constexpr,
):
# fmt: on
    """Write a block of one row: codes · scale / 127."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width_stride
    offsets = row * width_stride + columns
    factor = tl.div_rn(tl.load(scale + row), 127.0)
    values = tl.load(codes + offsets, mask=mask, other=0).to(tl.float32) * factor
    tl.store(out + offsets, values.to(out.dtype.element_ty), mask=mask)


def cast_weight(codes: Tensor, scale: Tensor, out: Tensor) -> None:
    """Write codes (rows, width) times scale (rows,) / 127 to `out`; all contiguous."""
    rows, width = codes.shape
    settings = options()
    cast_weight_kernel[(rows, triton.cdiv(width, settings["BLOCK"]))](codes, width, scale, out, **settings)


@functools.cache
def options() -> dict[str, Any]:
    """What a launch is given."""
    return {"BLOCK": block_size(2048, interpreted=16), "num_warps": 4}


def variants() -> list[Variant]:
    """Every configuration that `cast_weight` can launch."""
    return [
        Variant(
            cast_weight_kernel,
            options(),
            {"codes": torch.int8, "scale": torch.float32, "out": dtype},
            f"{1 + dtype.itemsize} bytes a weight",
        )
        for dtype in DTYPES
    ]
