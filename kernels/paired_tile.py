"""The paired pass over a tile: policy z_p and frozen reference z_q side by side, for KL(q||p) and its gradient.

    gap = z_p - z_q - shift      row = e^(z_q - base) expm1(gap)      reference row = e^(z_q - base)

`shift` is near lse_p - lse_q, so where p is almost q (the start of every LoRA run) a row is a small number times an
expm1, never a difference of two rounded probabilities; every summand of the value, e^(z_q - base) (expm1(gap) - gap),
is >= 0. One program a row, one launch a tile. The first look brings both running normalisers up to date, a partial
result for each column of a block; then, a few numbers a row, base and shift are chosen, and where they move what was
accumulated moves with them, the program's own rows of both gradients included; the second look, from cache, writes.

Everything is float32: differences of nearby numbers are taken first (z_p - z_q before shift, tops before logarithms).

    reads  4 c (2 once from the cache)        writes  2 c + 11 numbers a row
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from fastforget_kernels.arithmetic import (
    NEAR_SHIFT,
    RECENTRE,
    expm1_excess_near,
    finite_or_zero,
    label_in_tile,
    load_logits,
    moved_top,
    nonnegative,
    store_row,
    times,
)
from fastforget_kernels.launching import Variant, block_size, tile_kernel

LOWEST = tl.constexpr(-3.0e38)  # below any logit but -infinity
# rows of the buffer, in this order
ACCUMULATORS = tuple(
    (
        "policy_top policy_total reference_top reference_total gap_moment base shift difference excess policy_label "
        "reference_label"
    ).split()
)


@triton.jit
def online(top, total, logits):
    """(largest logit, sum of e^(z - it), what the sum was faded with, the new weights), a column of the block each."""
    larger = logits > top
    smaller = tl.exp(-tl.abs(logits - top))  # of the two, in one exponential: the other is 1
    fade = tl.where(larger, smaller, 1.0)
    weights = tl.where(larger, 1.0, smaller)
    return tl.where(larger, logits, top), total * fade + weights, fade, weights


@triton.jit
def gathered(top, total, tops, totals):
    """A row's top and total, with those of a tile's columns; and what the row's and the columns' were faded with."""
    tops = tl.where(tops == LOWEST, float("-inf"), tops)
    tile_top = tl.max(tops, 0)
    new_top = tl.where(tile_top > top, tile_top, top)
    base = finite_or_zero(new_top)
    fade = tl.exp(top - base)
    fades = tl.exp(tops - base)
    return new_top, total * fade + tl.sum(totals * fades, 0), fade, fades


# fmt: off
@tile_kernel
def paired_tile_kernel(
    policy, policy_stride, reference, reference_stride,  # (r, c) products with the head, float32
    out, out_stride, reference_out, reference_out_stride,  # (r, c) of one dtype
    bias,
    first,  # column of the vocabulary that the tile begins at
    columns,
    padded,  # elements of a row that may be read and written
    scale, softcap,
    bias_columns,  # columns, or 0 where there is no bias
    labels,  # (r,) int64; a negative one is none
    accumulators, accumulators_stride,  # (ACCUMULATORS, r) float32
    shift,  # (r,) float32, read where `shift_given`
    shift_given,
    grad, grad_stride,  # (r, D) float32
    grad_width,  # D, or 0 where there is nothing to move
    reference_grad, reference_grad_stride, reference_grad_width, write, reference_write,
    TRANSFORM: tl.constexpr,  # there is a bias or a softcap
    BLOCK: tl.constexpr,
):
# fmt: on
    """One row of a tile."""
    row = tl.program_id(0).to(tl.int64)
    policy += row * policy_stride
    reference += row * reference_stride
    out += row * out_stride
    reference_out += row * reference_out_stride
    bias += first
    accumulators += row
    stride = accumulators_stride.to(tl.int64)
    label = label_in_tile(labels, row, first, columns)
    begun = first > 0
    old_policy_top = tl.load(accumulators, mask=begun, other=float("-inf"))
    old_policy_total = tl.load(accumulators + stride, mask=begun, other=0.0)
    old_top = tl.load(accumulators + 2 * stride, mask=begun, other=float("-inf"))
    old_total = tl.load(accumulators + 3 * stride, mask=begun, other=0.0)
    old_moment = tl.load(accumulators + 4 * stride, mask=begun, other=0.0)
    old_base = tl.load(accumulators + 5 * stride, mask=begun, other=float("-inf"))
    old_shift = tl.load(accumulators + 6 * stride, mask=begun, other=0.0)
    difference = tl.load(accumulators + 7 * stride, mask=begun, other=0.0)
    excess = tl.load(accumulators + 8 * stride, mask=begun, other=0.0)
    policy_label = tl.load(accumulators + 9 * stride, mask=begun, other=float("-inf"))
    reference_label = tl.load(accumulators + 10 * stride, mask=begun, other=float("-inf"))

    policy_tops = tl.full((BLOCK,), LOWEST, tl.float32)  # finite, lest -infinity be taken from itself
    policy_totals = tl.zeros((BLOCK,), tl.float32)
    tops = tl.full((BLOCK,), LOWEST, tl.float32)
    totals = tl.zeros((BLOCK,), tl.float32)
    moments = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        index = start + tl.arange(0, BLOCK)
        others = (index < columns) & (index != label)
        z_p = load_logits(policy, index, padded, bias, scale, softcap, bias_columns, TRANSFORM)
        z_p = tl.where(others, z_p, float("-inf"))
        z_q = load_logits(reference, index, padded, bias, scale, softcap, bias_columns, TRANSFORM)
        z_q = tl.where(others, z_q, float("-inf"))
        policy_tops, policy_totals, _, _ = online(policy_tops, policy_totals, z_p)
        tops, totals, fades, weights = online(tops, totals, z_q)
        here = tl.where(weights > 0.0, weights * (z_p - z_q), 0.0)
        moments = tl.where(fades > 0.0, moments * fades, 0.0) + here
    policy_top, policy_total, _, _ = gathered(old_policy_top, old_policy_total, policy_tops, policy_totals)
    top, total, fade, fades = gathered(old_top, old_total, tops, totals)
    moment = tl.where(fade > 0.0, old_moment * fade, 0.0) + tl.sum(tl.where(fades > 0.0, moments * fades, 0.0), 0)
    at_label = tl.maximum(label, 0)  # read by every thread, before any of them writes
    logit = load_logits(policy, at_label, padded, bias, scale, softcap, bias_columns, TRANSFORM)
    policy_label = tl.where(label >= 0, logit, policy_label)
    logit = load_logits(reference, at_label, padded, bias, scale, softcap, bias_columns, TRANSFORM)
    reference_label = tl.where(label >= 0, logit, reference_label)

    apart = (finite_or_zero(policy_top) - finite_or_zero(top)) + (tl.log(policy_total) - tl.log(total))
    is_finite = tl.abs(apart) < float("inf")
    far = (tl.abs(apart - old_shift) > RECENTRE) | (first == 0)
    new_shift = tl.where(is_finite & far, apart, old_shift)
    new_shift = tl.where(shift_given != 0, tl.load(shift + row, mask=shift_given != 0, other=0.0), new_shift)
    largest = tl.maximum(top, policy_top - new_shift)
    base = moved_top(old_base, largest, write, out.dtype.element_ty)
    # of a policy alone: the reference may lie far below it
    base = tl.where((old_top == float("-inf")) & (new_shift != old_shift), largest, base)
    grad += row * grad_stride
    reference_grad += row * reference_grad_stride
    if begun & ((base != old_base) | (new_shift != old_shift)):
        shifted = old_shift - new_shift
        # a row that has had logits of one side only had no shift yet: what the other's sums, of nothing, fade with may
        # be infinite
        faded = tl.where(old_top == float("-inf"), 0.0, tl.exp(old_base - base))
        along = tl.exp((old_base - base) + shifted)  # of what stands relative to the shift
        along = tl.where((old_policy_top == float("-inf")) & (shifted != 0.0), 0.0, along)
        rest = tl.where(shifted == 0.0, 0.0, along - faded)
        of_reference = tl.where(old_top == float("-inf"), 0.0, tl.exp(old_top - old_base))
        mass = old_total * of_reference  # sum of e^(z_q - base)
        # the sum of e^(z_q - base) gap, from whichever two sums are the smaller: in their difference these cancel
        gaps = (old_moment - old_shift * old_total) * of_reference
        size = (tl.abs(old_moment) + tl.abs(old_shift) * old_total) * of_reference
        gaps = tl.where(tl.abs(difference) + excess < size, difference - excess, gaps)
        near_curve = faded * expm1_excess_near(shifted)
        curve = tl.where(tl.abs(shifted) <= 1.0, near_curve, along - faded - faded * shifted)
        difference = along * difference + rest * mass
        moved_excess = nonnegative(along * excess + curve * mass + times(rest, gaps))
        excess = tl.where(excess == float("inf"), excess, moved_excess)
        for start in range(0, grad_width, BLOCK):
            index = start + tl.arange(0, BLOCK)
            beside = tl.load(reference_grad + index, mask=index < reference_grad_width, other=0.0)
            held = tl.load(grad + index, mask=index < grad_width, other=0.0)
            tl.store(grad + index, held * along + beside * rest, mask=index < grad_width)
            tl.store(reference_grad + index, beside * faded, mask=index < reference_grad_width)

    finite_base = finite_or_zero(base)
    # base + shift lies near the policy's own top, and is taken off its logits in two parts, as it rounds itself
    policy_base = finite_base + new_shift
    beyond = policy_base - finite_base
    policy_rest = (finite_base - (policy_base - beyond)) + (new_shift - beyond)
    # beyond NEAR_SHIFT z_p - z_q rounds at its size: in rows, plain differences lose less
    nearest = tl.where(tl.abs(new_shift) <= NEAR_SHIFT, 1.0, -1.0)
    differences = tl.zeros((BLOCK,), tl.float32)
    excesses = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        index = start + tl.arange(0, BLOCK)
        others = (index < columns) & (index != label)
        policy_logits = load_logits(policy, index, padded, bias, scale, softcap, bias_columns, TRANSFORM)
        z_p = tl.where(others, policy_logits, float("-inf"))
        z_q = load_logits(reference, index, padded, bias, scale, softcap, bias_columns, TRANSFORM)
        z_q = tl.where(others, z_q, float("-inf"))
        gap = tl.where(z_q == float("-inf"), float("inf"), (z_p - z_q) - new_shift)
        probability = tl.exp(z_q - finite_base)
        above = tl.exp((z_p - policy_base) - policy_rest)  # probability * e^gap
        near = tl.abs(gap) <= 1.0
        inner = tl.where(near, gap, 0.0)
        curve = expm1_excess_near(inner)
        row_here = tl.where(tl.abs(gap) <= nearest, probability * (inner + curve), above - probability)
        far_excess = nonnegative(above - probability - times(probability, gap))
        differences += row_here
        excesses += tl.where(near, probability * curve, far_excess)
        if write != 0:
            tl.debug_barrier()
            store_row(out, index, padded, row_here, policy_logits, softcap, TRANSFORM, True)
            if reference_write != 0:
                store_row(reference_out, index, padded, probability, policy_logits, softcap, TRANSFORM, True)

    tl.store(accumulators, policy_top)
    tl.store(accumulators + stride, policy_total)
    tl.store(accumulators + 2 * stride, top)
    tl.store(accumulators + 3 * stride, total)
    tl.store(accumulators + 4 * stride, moment)
    tl.store(accumulators + 5 * stride, base)
    tl.store(accumulators + 6 * stride, new_shift)
    tl.store(accumulators + 7 * stride, difference + tl.sum(differences, 0))
    tl.store(accumulators + 8 * stride, excess + tl.sum(excesses, 0))
    tl.store(accumulators + 9 * stride, policy_label)
    tl.store(accumulators + 10 * stride, reference_label)


@functools.cache
def options(transform: bool) -> dict[str, Any]:
    """What a launch is given."""
    # columns of two rows at a time: with 64 registers a thread, four programs fit a processor; the two tanh of a
    # softcap would spill there
    return {"TRANSFORM": transform, "BLOCK": block_size(1024), "num_warps": 16 if transform else 8}


def variants() -> list[Variant]:
    """Every configuration that can be launched."""
    return [
        Variant(
            paired_tile_kernel,
            options(transform),
            {"out": written, "reference_out": written},
            f"2 x 8 c read, 2 x {written.itemsize} c written",
        )
        for transform in (False, True)
        for written in (torch.float32, torch.bfloat16, torch.float16)
    ]
