"""The gradient pass over a tile, the normaliser known: one row over the logits for any mix of upstream gradients.

For what the label pass cannot write because it needs the final normaliser in the row itself: entropy, the expected
embedding (the row p (r - E_p r) with r = s W u), a head that trains, logits that a model has produced. Everything a row
needs was made of its statistics before, once (`fastforget.backends.fields.gradient_coefficients`):

    unit_v ((1 - p_y) (c_lse - c_entropy (z_v - top - offset_mean) + r_v - projected_mean) + c_unit)  +  c_logit_mean
    unit_v = share e^(z_v - top); the label's entry is its own, and c_max_logit is added at the argmax

One program a row, one launch a tile, one look at it.

    reads  c, or 2 c with r        writes  c
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton.language as tl

from fastforget_kernels.arithmetic import label_in_tile, load_logits, store_row
from fastforget_kernels.launching import Variant, block_size, tile_kernel

# rows of the buffer, in this order
COEFFICIENTS = tuple(
    (
        "top share others_probability label_probability lse entropy offset_mean unit label_entry max_logit logit_mean "
        "projected_mean"
    ).split()
)


# fmt: off
@tile_kernel
def gradient_tile_kernel(
    product, product_stride,  # (r, c) h @ W.T in float32, or logits of 16 bit
    projected, projected_stride,  # (r, c) float32, of float32 products
    out, out_stride, bias,
    first,  # column of the vocabulary that the tile begins at
    columns,
    padded,  # elements of a row that may be read and written
    scale, softcap,
    bias_columns,  # columns, or 0 where there is no bias
    labels,
    argmax,  # (r,) int64; -1 is none
    coefficients, coefficients_stride,  # (COEFFICIENTS, r) float32
    PROJECTED: tl.constexpr, BLOCK: tl.constexpr,
):
# fmt: on
    """One row of a tile."""
    row = tl.program_id(0).to(tl.int64)
    product += row * product_stride
    projected += row * projected_stride
    out += row * out_stride
    bias += first
    label = label_in_tile(labels, row, first, columns)
    best = label_in_tile(argmax, row, first, columns)
    coefficients += row
    stride = coefficients_stride.to(tl.int64)
    top = tl.load(coefficients)
    share = tl.load(coefficients + stride)
    others_probability = tl.load(coefficients + 2 * stride)
    label_probability = tl.load(coefficients + 3 * stride)
    for_lse = tl.load(coefficients + 4 * stride)
    for_entropy = tl.load(coefficients + 5 * stride)
    offset_mean = tl.load(coefficients + 6 * stride)
    for_unit = tl.load(coefficients + 7 * stride)
    label_entry = tl.load(coefficients + 8 * stride)
    for_max = tl.load(coefficients + 9 * stride)
    for_mean = tl.load(coefficients + 10 * stride)
    projected_mean = tl.load(coefficients + 11 * stride)
    for start in range(0, columns, BLOCK):
        index = start + tl.arange(0, BLOCK)
        logits = load_logits(product, index, padded, bias, scale, softcap, bias_columns, True)
        offsets = logits - top
        unit = tl.exp(offsets) * share
        # a logit may be minus infinity: not infinite times a probability of 0
        factor = for_lse - for_entropy * (tl.maximum(offsets, -200.0) - offset_mean)
        entry = label_entry
        if PROJECTED:
            along = tl.load(projected + index, mask=index < padded, other=0.0) * scale
            along -= projected_mean
            factor += along
            entry += label_probability * along
        gradient = tl.where(index == label, entry, unit * (others_probability * factor + for_unit))
        gradient += for_mean + tl.where(index == best, for_max, 0.0)
        tl.debug_barrier()
        store_row(out, index, padded, gradient, logits, softcap, True, False)


@functools.cache
def options(projected: bool) -> dict[str, Any]:
    """What a launch is given."""
    # with few rows a program has a processor to itself: 16 warps
    return {"PROJECTED": projected, "BLOCK": block_size(4096), "num_warps": 16}


def variants() -> list[Variant]:
    """Every configuration that can be launched."""
    found = []
    for dtype, written, projections in (
        (torch.float32, torch.float32, (False, True)),
        (torch.float32, torch.bfloat16, (False, True)),
        (torch.bfloat16, torch.bfloat16, (False,)),
        (torch.float16, torch.float16, (False,)),
    ):
        for projected in projections:
            traffic = f"{8 if projected else dtype.itemsize} c read, {written.itemsize} c written"
            dtypes = {"product": dtype, "projected": dtype, "out": written}
            found.append(Variant(gradient_tile_kernel, options(projected), dtypes, traffic))
    return found
