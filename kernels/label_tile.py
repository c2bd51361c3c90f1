"""The label pass over a tile: a row's accumulators brought up to date, and the tile's weights written for product 2.

One program a row, one launch a tile. The tile is looked at twice, the second time from cache: first for the largest
logit of the tokens other than the label, which decides whether the lazy top moves; then the weights e^(z - top), 0 at
the label, are added up and written, in place where product 2 takes float32, and in 16 bit at the beginning of the same
row's memory. Where the top has moved, which is rare, the program multiplies its own row of `grad` with e^(old - new).

Both looks keep one partial result for each column of a block of columns and reduce once at the end: shorter sums, and
no barrier a block. The moments are merged a block at a time instead (Chan's formula), around each block's own mean.

    reads  2 c (once from the cache)        writes  c + 4 (10) numbers a row        with the first tile  D more read
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from fastforget_kernels import state_rows
from fastforget_kernels.arithmetic import (
    add,
    finite_or_zero,
    label_in_tile,
    load_logits,
    merge,
    moved_top,
    store_row,
)
from fastforget_kernels.launching import Variant, block_size, tile_kernel
from fastforget_kernels.state_rows import measure_row

ACCUMULATORS = tuple("top total total_rest label_logit mean deviations sum sum_rest best best_index".split())
BASIC = 4


@triton.jit
def exceeds(value, largest):
    """Whether a value is larger, NaN being larger than all numbers."""
    return (largest == largest) & ((value > largest) | (value != value))


# fmt: off
@tile_kernel
def label_tile_kernel(
    product, product_stride,  # (r, c) h @ W.T in float32, or read-only logits of 16 bit
    out, out_stride, bias,
    first,  # column of the vocabulary that the tile begins at
    columns,
    padded,  # elements of a row that may be read and written
    scale, softcap,
    bias_columns,  # columns, or 0 where there is no bias
    labels,
    accumulators, accumulators_stride,  # (ACCUMULATORS or the first BASIC of them, r) float32
    moment_rows,  # whether they are all there
    grad, grad_stride,  # (r, D) float32
    grad_width,  # D, or 0 where nothing is to be faded
    write,
    hidden, hidden_stride, anchor, anchor_stride, centres, values, values_stride, nearest, width, centre_count,
    anchor_width, cosine,
    TRANSFORM: tl.constexpr,  # there is a bias or a softcap
    MOMENTS: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr, STATE_BLOCK: tl.constexpr, GROUP: tl.constexpr,
):
# fmt: on
    """One row of a tile."""
    row = tl.program_id(0).to(tl.int64)
    product += row * product_stride
    out += row * out_stride
    bias += first
    accumulators += row
    stride = accumulators_stride.to(tl.int64)
    label = label_in_tile(labels, row, first, columns)
    begun = first > 0
    top = tl.load(accumulators, mask=begun, other=float("-inf"))
    total = tl.load(accumulators + stride, mask=begun, other=0.0)
    total_rest = tl.load(accumulators + 2 * stride, mask=begun, other=0.0)
    label_logit = tl.load(accumulators + 3 * stride, mask=begun, other=float("-inf"))
    if STATES:
        # fmt: off
        measure_row(
            row, hidden, hidden_stride, anchor, anchor_stride, centres, values, values_stride, nearest, width,
            centre_count, anchor_width, cosine, STATE_BLOCK, GROUP,
        )
        # fmt: on

    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    largest_at = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, columns, BLOCK):
        index = start + tl.arange(0, BLOCK)
        logits = load_logits(product, index, padded, bias, scale, softcap, bias_columns, TRANSFORM)
        others = tl.where((index < columns) & (index != label), logits, float("-inf"))
        if MOMENTS:  # the first NaN, as torch has it, is the largest of all
            larger = exceeds(others, largest)
            largest_at = tl.where(larger, index, largest_at)
            largest = tl.where(larger, others, largest)
        else:
            largest = tl.maximum(largest, others)
    tile_top = tl.max(largest, 0)
    at_label = tl.maximum(label, 0)  # read by every thread, before any of them writes
    at_label = load_logits(product, at_label, padded, bias, scale, softcap, bias_columns, TRANSFORM)
    label_logit = tl.where(label >= 0, at_label, label_logit)
    new_top = moved_top(top, tile_top, write, out.dtype.element_ty)
    if MOMENTS:  # a mean of offsets from a lazy top would lose its digits to their size
        new_top = tl.where(tile_top > top, tile_top, top)
    base = finite_or_zero(new_top)
    fade = tl.exp(top - base)  # 0 before the first logit
    total *= fade
    total_rest *= fade
    if MOMENTS:
        known = begun & (moment_rows != 0)
        moved = tl.where(top == float("-inf"), 0.0, top - base)
        mean = tl.load(accumulators + 4 * stride, mask=known, other=0.0) + moved
        deviations = tl.load(accumulators + 5 * stride, mask=known, other=0.0) * fade
        plain = tl.load(accumulators + 6 * stride, mask=known, other=0.0)
        plain_rest = tl.load(accumulators + 7 * stride, mask=known, other=0.0)
        best = tl.load(accumulators + 8 * stride, mask=known, other=float("-inf"))
        best_index = tl.load(accumulators + 9 * stride, mask=known, other=0.0)
        unknown = largest != largest
        any_unknown = tl.max(unknown.to(tl.int32), 0) > 0
        tile_best = tl.where(any_unknown, float("nan"), tile_top)
        at_best = tl.where(any_unknown, unknown, largest == tile_top)
        tile_index = first + tl.min(tl.where(at_best, largest_at, 2147483647), 0)
        best_index = tl.where(exceeds(tile_best, best), tile_index.to(tl.float32), best_index)
        best = tl.where(exceeds(tile_best, best), tile_best, best)

    totals = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        index = start + tl.arange(0, BLOCK)
        mask = index < columns
        logits = load_logits(product, index, padded, bias, scale, softcap, bias_columns, TRANSFORM)
        offsets = tl.where(mask & (index != label), logits, float("-inf")) - base
        weights = tl.exp(offsets)
        if MOMENTS:
            offsets = tl.where(offsets == float("-inf"), 0.0, offsets)
            block_total = tl.sum(weights, 0)
            # divided, not times 1 / total: far below the top a block's total may be so small that this is infinite
            block_mean = tl.sum(weights * offsets, 0) / tl.where(block_total > 0.0, block_total, 1.0)
            gaps = offsets - block_mean
            block_deviations = tl.sum(weights * gaps * gaps, 0)
            mean, deviations = merge(mean, deviations, total, block_mean, block_deviations, block_total)
            total, total_rest = add(total, total_rest, block_total)
            plain, plain_rest = add(plain, plain_rest, tl.sum(tl.where(mask, logits, 0.0), 0))
        else:
            totals += weights
        if product.dtype.element_ty == tl.float32:  # a model's own logits, of 16 bits, are only read
            if write != 0:
                tl.debug_barrier()
                store_row(out, index, padded, weights, logits, softcap, TRANSFORM, True)
    if not MOMENTS:
        total, total_rest = add(total, total_rest, tl.sum(totals, 0))

    tl.store(accumulators, new_top)
    tl.store(accumulators + stride, total)
    tl.store(accumulators + 2 * stride, total_rest)
    tl.store(accumulators + 3 * stride, label_logit)
    if MOMENTS:
        known = moment_rows != 0
        tl.store(accumulators + 4 * stride, mean, mask=known)
        tl.store(accumulators + 5 * stride, deviations, mask=known)
        tl.store(accumulators + 6 * stride, plain, mask=known)
        tl.store(accumulators + 7 * stride, plain_rest, mask=known)
        tl.store(accumulators + 8 * stride, best, mask=known)
        tl.store(accumulators + 9 * stride, best_index, mask=known)
    if (grad_width > 0) & (fade != 1.0):
        grad += row * grad_stride
        for start in range(0, grad_width, BLOCK):
            index = start + tl.arange(0, BLOCK)
            held = tl.load(grad + index, mask=index < grad_width, other=0.0)
            tl.store(grad + index, held * fade, mask=index < grad_width)


@functools.cache
def options(transform: bool, moments: bool, states: bool) -> dict[str, Any]:
    """What a launch is given."""
    moments = moments or transform  # fewer configurations
    flags = {"TRANSFORM": transform, "MOMENTS": moments, "STATES": states}
    # with few rows a program has a processor to itself: 16 warps
    return {**flags, "BLOCK": block_size(4096), **state_rows.options(), "num_warps": 16}


def variants() -> list[Variant]:
    """Every configuration that can be launched."""
    found = []
    plain, with_moments = (False, False, False), (False, True, False)
    all_modes = (plain, (False, False, True), with_moments, (True, True, False))
    for dtype, written, modes in (
        (torch.float32, torch.float32, all_modes),
        (torch.float32, torch.bfloat16, all_modes),
        (torch.float32, torch.float16, all_modes),
        (torch.bfloat16, torch.bfloat16, (plain, with_moments)),  # a model's own logits, finished and only read
        (torch.float16, torch.float16, (plain, with_moments)),
    ):
        for mode in modes:
            states = mode[2]
            dtypes = {"product": dtype, "out": written, "hidden": written if states else torch.float32}
            traffic = f"2 x {dtype.itemsize} c read"
            traffic += f", {written.itemsize} c written" if dtype == torch.float32 else ""
            traffic += f", {written.itemsize} D + 4 D read" if states else ""
            found.append(Variant(label_tile_kernel, options(*mode), dtypes, traffic))
    return found
