"""The coupled pass over a tile, both normalisers known: reverse KL and JSD of policy p and reference q.

With m = (p + q) / 2:

    reverse KL   x = log p - log q      row p (x - centre)      sums p (expm1(-x) + x)
    JSD          x = log p - log m      row p (x - centre)      sums p (expm1(-x) + x)  and the same of q

and p itself is written beside it: the gradient is (row - (sum of row) p) times the head, and `centre`, near the mean of
x under p, keeps that difference small. Every summand is >= 0. One program a row, one launch a tile, one look at it.

    reads  2 c        writes  2 c + 4 numbers a row
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from fastforget_kernels.arithmetic import (
    NEAR_SHIFT,
    expm1,
    expm1_excess_near,
    label_in_tile,
    load_logits,
    log1p,
    nonnegative,
    store_row,
    times,
)
from fastforget_kernels.launching import Variant, block_size, tile_kernel

NORMALISERS = ("policy_top", "policy_log_total", "reference_top", "reference_log_total", "lse_gap", "centre")
ACCUMULATORS = ("ratio", "from_policy", "from_reference", "probability")  # rows of the buffer, in this order


@triton.jit
def relative_entropy(probability, target, gap):
    """probability * (expm1(gap) - gap) >= 0, gap = log(target / probability): what a KL sums."""
    near = tl.abs(gap) <= 1.0
    close = probability * expm1_excess_near(tl.where(near, gap, 0.0))
    return tl.where(near, close, nonnegative(target - probability - times(probability, gap)))


@triton.jit
def above_mixture(gap):
    """(log m - log p, log m - log q), m = (p + q) / 2, gap = log p - log q; exact where the two are close."""
    size = tl.abs(gap)
    from_larger = log1p(0.5 * expm1(-size))  # from the larger of the two probabilities
    from_smaller = size + from_larger
    return tl.where(gap <= 0.0, from_smaller, from_larger), tl.where(gap <= 0.0, from_larger, from_smaller)


# fmt: off
@tile_kernel
def coupled_tile_kernel(
    policy, policy_stride, reference, reference_stride,  # (r, c) products with the head, float32
    out, out_stride, policy_out, policy_out_stride,  # (r, c) of one dtype
    bias,
    first,  # column of the vocabulary that the tile begins at
    columns,
    padded,  # elements of a row that may be read and written
    scale, softcap,
    bias_columns,  # columns, or 0 where there is no bias
    labels,  # (r,) int64; a negative one is none
    normalisers, normalisers_stride,  # (NORMALISERS, r) float32
    accumulators, accumulators_stride,  # (ACCUMULATORS, r) float32
    write,
    JSD: tl.constexpr,  # or reverse KL
    BLOCK: tl.constexpr,
):
# fmt: on
    """One row of a tile."""
    row = tl.program_id(0).to(tl.int64)
    policy += row * policy_stride
    reference += row * reference_stride
    out += row * out_stride
    policy_out += row * policy_out_stride
    bias += first
    accumulators += row
    normalisers += row
    stride = accumulators_stride.to(tl.int64)
    label = label_in_tile(labels, row, first, columns)
    begun = first > 0
    ratio_sum = tl.load(accumulators, mask=begun, other=0.0)
    policy_sum = tl.load(accumulators + stride, mask=begun, other=0.0)
    reference_sum = tl.load(accumulators + 2 * stride, mask=begun, other=0.0)
    probability_sum = tl.load(accumulators + 3 * stride, mask=begun, other=0.0)
    stride = normalisers_stride.to(tl.int64)
    policy_top = tl.load(normalisers)
    policy_log_total = tl.load(normalisers + stride)
    reference_top = tl.load(normalisers + 2 * stride)
    reference_log_total = tl.load(normalisers + 3 * stride)
    lse_gap = tl.load(normalisers + 4 * stride)
    centre = tl.load(normalisers + 5 * stride)

    ratios = tl.zeros((BLOCK,), tl.float32)
    from_policy = tl.zeros((BLOCK,), tl.float32)
    from_reference = tl.zeros((BLOCK,), tl.float32)
    probabilities = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        index = start + tl.arange(0, BLOCK)
        others = (index < columns) & (index != label)
        policy_logits = load_logits(policy, index, padded, bias, scale, softcap, bias_columns, True)
        z_p = tl.where(others, policy_logits, float("-inf"))
        z_q = load_logits(reference, index, padded, bias, scale, softcap, bias_columns, True)
        z_q = tl.where(others, z_q, float("-inf"))
        # centred before the logarithm of the total, or large logits would cost it its digits
        log_p = (z_p - policy_top) - policy_log_total
        log_q = (z_q - reference_top) - reference_log_total
        gap = tl.where(tl.abs(lse_gap) <= NEAR_SHIFT, (z_p - z_q) - lse_gap, log_p - log_q)  # beyond, z_p - z_q rounds
        gap = tl.where((z_p == float("-inf")) & (z_q == float("-inf")), 0.0, gap)
        p = tl.exp(log_p)
        q = tl.exp(log_q)
        if JSD:
            above_p, above_q = above_mixture(gap)
            ratio = times(p, -above_p - centre)
            mixture = 0.5 * (p + q)  # not e^(log p + above_p), which is rounded differently from p
            from_policy += relative_entropy(p, mixture, above_p)
            from_reference += relative_entropy(q, mixture, above_q)
        else:
            ratio = times(p, gap - centre)
            from_policy += relative_entropy(p, q, -gap)
        ratios += ratio
        probabilities += p
        if write != 0:
            tl.debug_barrier()
            store_row(out, index, padded, ratio, policy_logits, softcap, True, False)
            store_row(policy_out, index, padded, p, policy_logits, softcap, True, False)

    stride = accumulators_stride.to(tl.int64)
    tl.store(accumulators, ratio_sum + tl.sum(ratios, 0))
    tl.store(accumulators + stride, policy_sum + tl.sum(from_policy, 0))
    tl.store(accumulators + 2 * stride, reference_sum + tl.sum(from_reference, 0))
    tl.store(accumulators + 3 * stride, probability_sum + tl.sum(probabilities, 0))


@functools.cache
def options(jsd: bool) -> dict[str, Any]:
    """What a launch is given."""
    # columns of two rows at a time: with 64 registers a thread, four programs fit a processor
    return {"JSD": jsd, "BLOCK": block_size(1024), "num_warps": 8}


def variants() -> list[Variant]:
    """Every configuration that can be launched."""
    return [
        Variant(
            coupled_tile_kernel,
            options(jsd),
            {"out": written, "policy_out": written},
            f"8 c read, 2 x {written.itemsize} c written",
        )
        for written in (torch.float32, torch.bfloat16)
        for jsd in (False, True)
    ]
