"""The loss formulas for Triton: twin of ``csrc/numerics.h``, name by name, for every kernel that ends in a loss.

One row has logits z, changes d and a target t. With m the largest logit, over v other than t,

    rest = Σ e^(z_v − m)        u = Σ e^(z_v − m)·expm1(d_v − d_t)        s = rest + e^(z_t − m).

Triton has neither ``log1p`` nor ``expm1`` that also runs in its interpreter, so both are written here. float32
throughout.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Up to here expm1 of a column of almost no weight (e^-87 and up) stays far from overflow.
LARGEST_EXPM1 = tl.constexpr(40.0)


@triton.jit
def expm1(x):
    """e^x − 1 without cancellation."""
    return expm1_beside(x, tl.exp(x))


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
def smoothing_term(epsilon, mean):
    """What label smoothing adds to a loss, from the mean of z_v − z_t, or of d_v − d_t to its change; as in torch a
    masked column (−inf) makes it infinite."""
    return tl.where(mean == float("-inf"), float("inf"), -epsilon * mean)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^−x) with the digits of both tails."""
    return tl.exp(tl.minimum(x, 0.0)) / (1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def softcap(c, z):
    """c·tanh(z / c)."""
    shrunk = expm1(-tl.abs(2.0 * z / c))
    size = c * shrunk / (2.0 + shrunk)
    return tl.where(z > 0, -size, size)


@triton.jit
def softcap_change(c, z, d):
    """By how much c·tanh(z / c) moves where z moves by d: sinh(d)·sech(z)·sech(z + d) without its overflows."""
    y, e = 2.0 * z / c, 2.0 * d / c
    up, down = tl.maximum(y, y + e), tl.maximum(-y, -y - e)
    size = 2.0 * c * expm1(-tl.abs(e)) * sigmoid(up) * sigmoid(down)
    return tl.where(e > 0, -size, size)
