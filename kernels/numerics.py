"""The loss formulas for Triton: twin of ``csrc/numerics.h``, name by name; and the exponentials that all kernels share.

One row has logits z, changes d and a target t. With m the largest logit, over v other than t,

    rest = Σ e^(z_v − m)        u = Σ e^(z_v − m)·expm1(d_v − d_t)        s = rest + e^(z_t − m).

Triton has neither ``log1p`` nor ``expm1`` that also runs in its interpreter, so both are written here. float32
throughout.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# Whether kernels run in Triton's interpreter, which multiplies bfloat16 wrongly and cuts it off instead of rounding.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# Adding and taking away 1.5 * 2^23 leaves no bits after the point: round to the nearest whole number.
ROUNDER = tl.constexpr(12582912.0)
LOG2_E = tl.constexpr(1.44269504088896341)
# ln 2 in two parts; the first has 15 bits, so that its product with a whole number up to 2^9 is exact.
LN2_HIGH = tl.constexpr(0.693145751953125)
LN2_LOW = tl.constexpr(1.42860682030941723e-6)

# Up to here expm1 of a column of almost no weight (e^-87 and up) stays far from overflow.
LARGEST_EXPM1 = tl.constexpr(40.0)


@triton.jit
def expm1(x):
    """e^x − 1 for x up to 88, of a larger one e^88, without cancellation: with x = n ln 2 + r it is

    2^n (e^r − 1) + (2^n − 1), the first by a polynomial fitted for |r| <= ln 2 / 2 (1.1e-8). A NaN stays one.
    """
    x = tl.where(x < -140.0, -140.0, tl.where(x > 88.0, 88.0, x))  # e^-140 is zero in float32
    n = (x * LOG2_E + ROUNDER) - ROUNDER
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = 0.041667137295 + r * (0.0083690760657 + r * 0.0013888872927)
    p = 1.0 + r * (0.4999999702 + r * (0.16666506231 + r * p))
    power = tl.exp2(n)
    return power * (r * p) + (power - 1.0)


@triton.jit
def expm1_beside(x, e):
    """e^x − 1 where e = e^x is at hand: the series where it is short enough (2e-8 at ±0.25), e − 1 elsewhere."""
    near = tl.abs(x) < 0.25
    y = tl.where(near, x, 0.0)
    tail = 1 / 6 + y * (1 / 24 + y * (1 / 120 + y * (1 / 720 + y * (1 / 5040))))
    return tl.where(near, y + y * y * (0.5 + y * tail), e - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x) to float32's last digits: the rounding of 1 + x is divided out again (W. Kahan)."""
    w = 1.0 + x
    safe = tl.where(w == 1.0, 2.0, w)
    return tl.where(w == 1.0, x, tl.where(w == float("inf"), x, tl.log(safe) * (x / (safe - 1.0))))


@triton.jit
def softplus(g):
    """log(1 + e^g); past 15 the second form keeps e^g from overflowing."""
    far = g > 15.0
    return tl.where(far, g + log1p(tl.exp(-tl.abs(g))), log1p(tl.exp(tl.where(far, 0.0, g))))


@triton.jit
def loss_of_sums(rest, m, z_t):
    """−log softmax(z)_t; where the target leads the loss is small and log1p keeps its digits."""
    return tl.where(z_t == m, log1p(rest), tl.log(rest + tl.exp(z_t - m)) - (z_t - m))


@triton.jit
def is_small_change(u, s, largest_step):
    """Whether ``small_change`` holds; a NaN is not small, and goes through ``large_change`` unharmed."""
    return (u / s > -0.5) & (largest_step <= LARGEST_EXPM1)


@triton.jit
def small_change(u, s):
    return log1p(u / s)


@triton.jit
def large_change(g0, g1):
    """From the logs of Σ e^(z_v − z_t) over v other than t, before and after."""
    return softplus(g1) - softplus(g0)


@triton.jit
def half_tanh(y):
    """tanh(y / 2), with all its digits near 0."""
    e = expm1(-tl.abs(y))
    size = -e / (2.0 + e)
    return tl.where(y < 0, -size, size)


@triton.jit
def smoothing_term(epsilon, mean):
    """What label smoothing adds to a loss, from the mean of z_v − z_t, or of d_v − d_t to its change; as in torch a
    masked column (−inf) makes it infinite."""
    return tl.where(mean == float("-inf"), float("inf"), -epsilon * mean)


@triton.jit
def softcap(c, z):
    """What a soft cap c lets through of a logit: c tanh(z / c)."""
    return c * half_tanh(2.0 * z / c)


@triton.jit
def softcap_change(c, z, d):
    """How much that moves where the logit moves by d: sinh(d) sech(z) sech(z + d) without its overflows."""
    y = 2.0 * z / c
    dy = 2.0 * d / c
    y1 = y + dy
    up = tl.where(dy > 0, y1, y)
    low = tl.where(dy > 0, y, y1)
    size = -2.0 * c * expm1(-tl.abs(dy)) / ((1.0 + tl.exp(-up)) * (1.0 + tl.exp(low)))
    return tl.where(dy > 0, size, -size)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 in another type, to the nearest, also in the interpreter."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        near = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        x = tl.where(x == x, near, x)
    return x.to(dtype)


@triton.jit
def product(a, b, total):
    """total + a b in float32: exact products of bfloat16, no shortened ones of float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")
