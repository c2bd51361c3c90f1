"""Arithmetic that every row kernel shares: how a product with the head becomes a logit, and functions near zero.

`libdevice` has log1p, expm1 and tanh, but not on every device and not in Triton's interpreter; these are accurate to a
few units in the last place of float32 everywhere.
"""

import triton
import triton.language as tl

INTERPRETING = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1, without losing x where 1 + x rounds."""
    total = 1.0 + x
    exact = tl.where(total == 1.0, 1.0, total - 1.0)  # the part of x that total holds; never 0
    return tl.where(total == 1.0, x, tl.log(total) * (x / exact))


@triton.jit
def softplus(x):
    """log(1 + e^x), for any x, infinities included."""
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def expm1_excess(x):
    """(e^x - 1) - x, >= 0, with full relative precision near 0."""
    near = tl.minimum(tl.maximum(x, -1.0), 1.0)
    # Horner's scheme of x^2/2 + x^3/6 + ...; the first term left out is below 2^-27 of the first at |x| = 1
    series = 1.0 + near * (1.0 / 12.0)
    series = 1.0 + near * (1.0 / 11.0) * series
    series = 1.0 + near * (1.0 / 10.0) * series
    series = 1.0 + near * (1.0 / 9.0) * series
    series = 1.0 + near * (1.0 / 8.0) * series
    series = 1.0 + near * (1.0 / 7.0) * series
    series = 1.0 + near * (1.0 / 6.0) * series
    series = 1.0 + near * (1.0 / 5.0) * series
    series = 1.0 + near * (1.0 / 4.0) * series
    series = 1.0 + near * (1.0 / 3.0) * series
    return tl.where(tl.abs(x) <= 1.0, 0.5 * near * near * series, tl.exp(x) - 1.0 - x)


@triton.jit
def expm1(x):
    """e^x - 1."""
    return tl.where(tl.abs(x) <= 1.0, x + expm1_excess(tl.minimum(tl.maximum(x, -1.0), 1.0)), tl.exp(x) - 1.0)


@triton.jit
def tanh(x):
    """The hyperbolic tangent."""
    less_one = expm1(-2.0 * tl.abs(x))  # in [-1, 0]
    size = -less_one / (2.0 + less_one)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def finish_logits(product, bias, columns, scale, softcap, bias_count, TRANSFORM: tl.constexpr):
    """z from h @ W.T: times scale; and where TRANSFORM, bias (of `bias_count` entries: V or 0) and softcap (if > 0)."""
    logits = product.to(tl.float32) * scale
    if TRANSFORM:
        logits += tl.load(bias + columns, mask=columns < bias_count, other=0.0).to(tl.float32)
        cap = tl.where(softcap > 0.0, softcap, 1.0)
        logits = tl.where(softcap > 0.0, cap * tanh(logits / cap), logits)
    return logits


@triton.jit
def narrow(row, ELEMENT_TYPE: tl.constexpr):
    """The row in the dtype that it is stored in, rounded to nearest: the interpreter would cut bfloat16 off."""
    if INTERPRETING and ELEMENT_TYPE == tl.bfloat16:
        bits = row.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        row = (bits & -65536).to(tl.float32, bitcast=True)
    return row.to(ELEMENT_TYPE)


@triton.jit
def softcap_slope(logits, softcap):
    """d z / d (z before the cap): 1 - (z / cap)^2; 1 where there is no cap."""
    ratio = logits / tl.where(softcap > 0.0, softcap, 1.0)
    return tl.where(softcap > 0.0, 1.0 - ratio * ratio, 1.0)


@triton.jit
def finite_or_zero(top):
    """The largest logit to subtract: 0 where there was none (-inf), so that -inf - top stays -inf."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def power_of_two_below(x):
    """A power of two in (x / 4, x], for x > 0; 1 for 0. For scaling rows, where only its size matters."""
    return tl.exp2(tl.floor(tl.log2(tl.where(x > 0.0, x, 1.0))))
