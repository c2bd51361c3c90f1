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
from torch import Tensor

from fastforget_kernels import state_rows as states_of_rows
from fastforget_kernels.arithmetic import (
    FLOAT16_SCALE,
    add,
    finish_logits,
    finite_or_zero,
    label_in_tile,
    merge,
    moved_top,
    narrow,
    times_slope,
)
from fastforget_kernels.launching import UNALIGNED, UNSPECIALISED, Place, Variant, block_size, signature
from fastforget_kernels.state_rows import States, measure_row, state_rows

BLOCK = 4096  # columns at a time
WARPS = 16  # with few rows a program has a processor to itself
ACCUMULATORS = tuple("top total total_rest label_logit mean deviations sum sum_rest best best_index".split())
BASIC = 4


# fmt: off
@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNALIGNED)
def label_tile_kernel(
    product, product_stride, out, out_stride, bias, labels, accumulators, accumulators_stride, grad, grad_stride,
    hidden, hidden_stride, anchor, anchor_stride, centres, values, values_stride, nearest, width, centre_count,
    anchor_width, cosine,
    first,  # column of the vocabulary that the tile begins at
    columns,
    padded,  # elements of a row that may be read and written
    scale, softcap,
    bias_columns,  # columns, or 0 where there is no bias
    moment_rows,  # whether the accumulators have those of the moments
    write,
    grad_width,  # D, or 0 where nothing is to be faded
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
        loaded = tl.load(product + index, mask=index < padded, other=0.0)
        logits = finish_logits(loaded, bias, index, scale, softcap, bias_columns, TRANSFORM)
        others = tl.where((index < columns) & (index != label), logits, float("-inf"))
        if MOMENTS:
            larger = others > largest
            largest_at = tl.where(larger, index, largest_at)
            largest = tl.where(larger, others, largest)
        else:
            largest = tl.maximum(largest, others)
    tile_top = tl.max(largest, 0)
    at_label = tl.load(product + tl.maximum(label, 0))  # by every thread, before any of them writes
    at_label = finish_logits(at_label, bias, tl.maximum(label, 0), scale, softcap, bias_columns, TRANSFORM)
    label_logit = tl.where(label >= 0, at_label, label_logit)
    strict = write != 0
    if out.dtype.element_ty != tl.float16:
        strict = write < 0  # never
    new_top = moved_top(top, tile_top, strict)
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
        tile_best = tl.min(tl.where(largest == tile_top, largest_at, 2147483647), 0)
        best_index = tl.where(tile_top > best, (first + tile_best).to(tl.float32), best_index)
        best = tl.where(tile_top > best, tile_top, best)

    totals = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        index = start + tl.arange(0, BLOCK)
        mask = index < columns
        loaded = tl.load(product + index, mask=index < padded, other=0.0)
        logits = finish_logits(loaded, bias, index, scale, softcap, bias_columns, TRANSFORM)
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
                if TRANSFORM:
                    weights = times_slope(weights, logits, softcap)
                if out.dtype.element_ty == tl.float16:
                    weights *= FLOAT16_SCALE
                # the narrower row begins where these logits do: every thread has read its own before any writes
                tl.debug_barrier()
                tl.store(out + index, narrow(weights, out.dtype.element_ty), mask=index < padded)
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


def label_tile(
    product: Tensor,
    rows: Tensor | None,
    labels: Tensor,
    accumulators: Tensor,
    grad: Tensor | None,
    states: States | None,
    place: Place,
) -> None:
    """Run the label pass over a tile; see `fastforget.backends.protocol`.

    Args:
        product: (r, c) h @ W.T in float32, or read-only logits of 16 bit; rows contiguous.
        rows: (r, c) for the weights, float32, bfloat16 or float16; its rows may begin where the product's begin.
        accumulators: (BASIC or all of ACCUMULATORS, r) float32, rows of any stride.
        grad: (r, D) float32, multiplied where the top moves; not read at the first tile.
        states: measured too, whatever the tile: give them with one.
    """
    transform = place.transforms
    moment_rows = accumulators.shape[0] > BASIC
    fused = False
    out = product if rows is None else rows
    state_arguments = (accumulators, 0, accumulators, 0, accumulators, accumulators, 0, labels, 0, 0, 0, 0)
    if states is not None:
        written = states.hidden if rows is None else rows  # where nothing is written, any dtype will do
        fused = not transform and not moment_rows and product.dtype == torch.float32
        fused = fused and written.dtype == states.hidden.dtype
        if fused:
            out, state_arguments = written, states.arguments()
        else:  # rarely: in a launch of its own, for fewer configurations
            state_rows(states)
    # fmt: off
    label_tile_kernel[(product.shape[0],)](
        product, product.stride(0), out, out.stride(0), place.bias_or(accumulators), labels, accumulators,
        accumulators.stride(0), accumulators if grad is None else grad, 0 if grad is None else grad.stride(0),
        *state_arguments, *place.numbers(), int(moment_rows),
        int(rows is not None), 0 if grad is None or place.first == 0 else grad.shape[1],
        **options(transform, moment_rows, fused),
    )
    # fmt: on


@functools.cache
def options(transform: bool, moments: bool, states: bool) -> dict[str, Any]:
    """Constants of a launch."""
    return {
        "TRANSFORM": transform,
        "MOMENTS": moments or transform,  # fewer configurations
        "STATES": states,
        "BLOCK": block_size(BLOCK),
        **{f"STATE_{name}" if name == "BLOCK" else name: size for name, size in states_of_rows.sizes().items()},
        "num_warps": WARPS,
    }


def variants() -> list[Variant]:
    """Every configuration that `label_tile` can launch."""
    found = []
    modes = [(False, False, False), (False, False, True), (False, True, False), (True, True, False)]
    for dtype, written in (
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16),  # a model's own logits, finished and only read
        (torch.float16, torch.float16),
    ):
        for transform, moments, states in modes if dtype == torch.float32 else (modes[0], modes[2]):
            pointers = {
                "product": dtype,
                "out": written,
                **dict.fromkeys(("bias", "accumulators", "grad", "anchor", "centres", "values"), torch.float32),
                "hidden": written if states else torch.float32,
                **dict.fromkeys(("labels", "nearest"), torch.int64),
            }
            constants = {"TRANSFORM": transform, "MOMENTS": moments, "STATES": states, "BLOCK": BLOCK}
            constants |= {"STATE_BLOCK": states_of_rows.BLOCK, "GROUP": states_of_rows.GROUP}
            traffic = f"2 x {dtype.itemsize} c read"
            traffic += f", {written.itemsize} c written" if dtype == torch.float32 else ""
            traffic += f", {written.itemsize} D + 4 D read" if states else ""
            kinds = signature(label_tile_kernel, **pointers)
            found.append(Variant(label_tile_kernel, kinds, constants, WARPS, traffic))
    return found
