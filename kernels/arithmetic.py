"""What all tile kernels share: products read as logits, rows written over them, sums and functions that keep digits.

`libdevice` has log1p, expm1 and tanh, but not on every device and not in Triton's interpreter; these are accurate to a
few units in the last place of float32 everywhere.
"""

import triton
import triton.language as tl

INTERPRETING = tl.constexpr(bool(triton.knobs.runtime.interpret))
# `fastforget.backends.protocol` says what these are; a test holds them to it
LAZY = tl.constexpr(30.0)
FLOAT16_SCALE = tl.constexpr(8192.0)
RECENTRE = tl.constexpr(0.5)
NEAR_SHIFT = tl.constexpr(8.0)


@triton.jit
def log1p(x):
    """log(1 + x) for -1/2 <= x <= 1, without losing x where 1 + x rounds."""
    total = 1.0 + x
    exact = tl.where(total == 1.0, 1.0, total - 1.0)  # the part of x that total holds; never 0
    return tl.where(total == 1.0, x, tl.log(total) * (x / exact))


@triton.jit
def expm1_excess_near(x):
    """(e^x - 1) - x >= 0 for |x| <= 1, with full relative precision near 0; finite for all x but NaN."""
    near = tl.minimum(tl.maximum(x, -1.0), 1.0)
    # Horner's scheme of x^2/2 + x^3/6 + ...; the first term left out is below 2^-27 of the first at |x| = 1
    series = near * (2.0 / 479001600.0) + 2.0 / 39916800.0
    series = series * near + 2.0 / 3628800.0
    series = series * near + 2.0 / 362880.0
    series = series * near + 2.0 / 40320.0
    series = series * near + 2.0 / 5040.0
    series = series * near + 2.0 / 720.0
    series = series * near + 2.0 / 120.0
    series = series * near + 2.0 / 24.0
    series = series * near + 2.0 / 6.0
    series = series * near + 1.0
    return 0.5 * near * near * series


@triton.jit
def expm1(x):
    """e^x - 1."""
    return tl.where(tl.abs(x) <= 1.0, x + expm1_excess_near(x), tl.exp(x) - 1.0)


@triton.jit
def tanh(x):
    """The hyperbolic tangent: Cephes' polynomial near 0, which keeps x's digits."""
    square = tl.minimum(x * x, 0.5)
    series = square * -5.70498872745e-3 + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    size = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, x + x * square * series, tl.where(x < 0.0, -size, size))


@triton.jit
def load_logits(product, index, padded, bias, scale, softcap, bias_columns, TRANSFORM: tl.constexpr):
    """z at columns of a row of h @ W.T: times scale; where TRANSFORM, bias (of `bias_columns`) and softcap (if > 0)."""
    logits = tl.load(product + index, mask=index < padded, other=0.0).to(tl.float32) * scale
    if TRANSFORM:
        if bias_columns > 0:
            logits += tl.load(bias + index, mask=index < bias_columns, other=0.0)
        if softcap > 0.0:
            logits = softcap * tanh(logits / softcap)
    return logits


@triton.jit
def narrow(row, ELEMENT_TYPE: tl.constexpr):
    """The row in the dtype that it is stored in, rounded to nearest: the interpreter would cut bfloat16 off."""
    if INTERPRETING and ELEMENT_TYPE == tl.bfloat16:
        bits = row.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        row = tl.where(row == row, (bits & -65536).to(tl.float32, bitcast=True), float("nan"))
    return row.to(ELEMENT_TYPE)


@triton.jit
def store_row(out, index, padded, values, logits, softcap, TRANSFORM: tl.constexpr, SCALED: tl.constexpr):
    """Write values times d z / d (z before the softcap) = 1 - (z / cap)^2; float16 times FLOAT16_SCALE where SCALED.

    A narrower row begins where its logits begin. So kernels write blocks in ascending order, each after a barrier: by
    then every thread has read its own logits of the block.
    """
    if TRANSFORM:
        if softcap > 0.0:
            ratio = logits / softcap
            values *= 1.0 - ratio * ratio
    if SCALED and out.dtype.element_ty == tl.float16:
        values *= FLOAT16_SCALE
    tl.store(out + index, narrow(values, out.dtype.element_ty), mask=index < padded)


@triton.jit
def finite_or_zero(top):
    """The logit to subtract: 0 where there was none (-infinity), so that -infinity stays what it is."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def moved_top(top, largest, write, ELEMENT_TYPE: tl.constexpr):
    """The lazy top after logits whose largest is `largest`; the largest so far where float16 rows are written.

    NaN moves nothing.
    """
    limit = top + LAZY
    if ELEMENT_TYPE == tl.float16:
        limit = tl.where(write != 0, top, limit)
    return tl.where(largest > limit, largest, top)


@triton.jit
def nonnegative(x):
    """x where it is not below 0; not tl.maximum, which would make 0 of NaN."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def times(probability, factor):
    """Their product, 0 where the probability is 0 and the factor infinite; NaN stays."""
    return tl.where((probability == 0.0) & (tl.abs(factor) == float("inf")), 0.0, probability * factor)


@triton.jit
def add(total, rest, value):
    """Neumaier's sum: total + value, and in `rest` what all the roundings so far took off."""
    new = total + value
    larger_total = tl.abs(total) >= tl.abs(value)
    lost = tl.where(larger_total, (total - new) + value, (value - new) + total)
    return new, rest + tl.where(lost == lost, lost, 0.0)  # of an infinite sum nothing is lost


@triton.jit
def merge(mean, deviations, weight, other_mean, other_deviations, other_weight):
    """Chan's formula: mean and squared deviations of two weighted sets together.

    The mean is taken from the heavier set's: from a far lighter one's it would be rounded at the gap's size.
    """
    together = weight + other_weight
    divisor = tl.where(together > 0.0, together, 1.0)
    share = other_weight / divisor
    gap = other_mean - mean
    mean = tl.where(share > 0.5, other_mean - gap * (weight / divisor), mean + gap * share)
    return mean, deviations + other_deviations + gap * gap * weight * share


@triton.jit
def label_in_tile(labels, row, first, columns):
    """The column of a row's label inside the tile, -1 where it is not there."""
    label = tl.load(labels + row) - first
    return tl.where((label >= 0) & (label < columns), label, -1).to(tl.int32)
