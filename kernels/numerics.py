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
    """e^x − 1 without cancellation: its series where it is short enough (2e-8 at ±0.25), the exponential elsewhere."""
    near = tl.abs(x) < 0.25
    y = tl.where(near, x, 0.0)
    series = 1.0 + y / 2 * (1.0 + y / 3 * (1.0 + y / 4 * (1.0 + y / 5 * (1.0 + y / 6 * (1.0 + y / 7)))))
    return tl.where(near, y * series, tl.exp(x) - 1.0)


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
