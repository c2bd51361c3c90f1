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
from torch import Tensor

from fastforget_kernels.arithmetic import (
    NEAR_SHIFT,
    expm1,
    expm1_excess_near,
    finish_logits,
    label_in_tile,
    log1p,
    narrow,
    nonnegative,
    times,
    times_slope,
)
from fastforget_kernels.launching import UNALIGNED, UNSPECIALISED, Place, Variant, block_size, signature

BLOCK = 1024  # columns of two rows at a time: with 64 registers a thread, four programs fit a processor
WARPS = 8
KINDS = ("reverse_kl", "jsd")
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
@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNALIGNED)
def coupled_tile_kernel(
    policy, policy_stride, reference, reference_stride, out, out_stride, policy_out, policy_out_stride, bias,
    labels,  # (r,) int64; a negative one is none
    normalisers, normalisers_stride, accumulators, accumulators_stride,
    first,  # column of the vocabulary that the tile begins at
    columns,
    padded,  # elements of a row that may be read and written
    scale, softcap,
    bias_columns,  # columns, or 0 where there is no bias
    write,
    KIND: tl.constexpr,  # index in KINDS
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
        loaded = tl.load(policy + index, mask=index < padded, other=0.0)
        policy_logits = finish_logits(loaded, bias, index, scale, softcap, bias_columns, True)
        z_p = tl.where(others, policy_logits, float("-inf"))
        loaded = tl.load(reference + index, mask=index < padded, other=0.0)
        z_q = finish_logits(loaded, bias, index, scale, softcap, bias_columns, True)
        z_q = tl.where(others, z_q, float("-inf"))
        # centred before the logarithm of the total, or large logits would cost it its digits
        log_p = (z_p - policy_top) - policy_log_total
        log_q = (z_q - reference_top) - reference_log_total
        gap = tl.where(tl.abs(lse_gap) <= NEAR_SHIFT, (z_p - z_q) - lse_gap, log_p - log_q)  # beyond, z_p - z_q rounds
        gap = tl.where((z_p == float("-inf")) & (z_q == float("-inf")), 0.0, gap)
        p = tl.exp(log_p)
        q = tl.exp(log_q)
        if KIND == 0:
            ratio = times(p, gap - centre)
            from_policy += relative_entropy(p, q, -gap)
        else:
            above_p, above_q = above_mixture(gap)
            ratio = times(p, -above_p - centre)
            mixture = 0.5 * (p + q)  # not e^(log p + above_p), which is rounded differently from p
            from_policy += relative_entropy(p, mixture, above_p)
            from_reference += relative_entropy(q, mixture, above_q)
        ratios += ratio
        probabilities += p
        if write != 0:
            ratio = times_slope(ratio, policy_logits, softcap)
            p = times_slope(p, policy_logits, softcap)
            # narrower rows begin where these logits do: every thread has read its own before any writes
            tl.debug_barrier()
            tl.store(out + index, narrow(ratio, out.dtype.element_ty), mask=index < padded)
            tl.store(policy_out + index, narrow(p, policy_out.dtype.element_ty), mask=index < padded)

    stride = accumulators_stride.to(tl.int64)
    tl.store(accumulators, ratio_sum + tl.sum(ratios, 0))
    tl.store(accumulators + stride, policy_sum + tl.sum(from_policy, 0))
    tl.store(accumulators + 2 * stride, reference_sum + tl.sum(from_reference, 0))
    tl.store(accumulators + 3 * stride, probability_sum + tl.sum(probabilities, 0))


def coupled_tile(
    kind: str,
    policy: Tensor,
    reference: Tensor,
    rows: Tensor | None,
    policy_rows: Tensor | None,
    labels: Tensor,
    normalisers: Tensor,
    accumulators: Tensor,
    place: Place,
) -> None:
    """Run the coupled pass over a tile; see `fastforget.backends.protocol`.

    Args:
        policy, reference: (r, c) products with the head, float32, rows contiguous.
        rows, policy_rows: (r, c) of one dtype for what is written, both or neither; they may begin where `policy` and
            `reference` do.
        normalisers: (NORMALISERS, r) float32.
        accumulators: (ACCUMULATORS, r) float32, rows of any stride.
    """
    out = policy if rows is None else rows
    policy_out = out if policy_rows is None else policy_rows
    # fmt: off
    coupled_tile_kernel[(policy.shape[0],)](
        policy, policy.stride(0), reference, reference.stride(0), out, out.stride(0), policy_out,
        policy_out.stride(0), place.bias_or(accumulators), labels, normalisers, normalisers.stride(0),
        accumulators, accumulators.stride(0), *place.numbers(),
        int(rows is not None), **options(kind),
    )
    # fmt: on


@functools.cache
def options(kind: str) -> dict[str, Any]:
    """Constants of a launch."""
    block = block_size(BLOCK)
    return {"KIND": KINDS.index(kind), "BLOCK": block, "num_warps": WARPS}


def variants() -> list[Variant]:
    """Every configuration that `coupled_tile` can launch."""
    found = []
    floats = dict.fromkeys(("policy", "reference", "bias", "normalisers", "accumulators"), torch.float32)
    for written in (torch.float32, torch.bfloat16):
        kinds = signature(coupled_tile_kernel, out=written, policy_out=written, labels=torch.int64, **floats)
        for kind in range(len(KINDS)):
            traffic = f"8 c read, 2 x {written.itemsize} c written"
            found.append(Variant(coupled_tile_kernel, kinds, {"KIND": kind, "BLOCK": BLOCK}, WARPS, traffic))
    return found
