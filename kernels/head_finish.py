"""From the sums of a row's parts of the vocabulary to its loss and changes, as csrc/cpu/linear_cross_entropy_delta.cpp
does it: in float64, the parts in their order.

VALUES (3, P, N) holds of each part the largest logit m, Σ e^(z−m) and Σ z−z_t; CHANGES (4, P, Q, N) Σ e^(z−m)·expm1(t),
Σ e^(z−m+t), the largest t and Σ t, with t = d_v − d_t; AFTERS (2, P, Q, N) the largest z−z_t+t and Σ e^(z−z_t+t) from
there. All sums are over v other than the target.
"""

from __future__ import annotations

import triton
import triton.language as tl

from finf_fast.kernels.numerics import (
    LARGEST_EXPM1,
    is_small_change,
    large_change,
    loss_of_sums,
    small_change,
    smoothing_term,
)

# e^(z−m) is zero below e^-87. What so went missing of Σ e^(z−m+t) is under e^(largest t − 87)·V, hence no digit of it
# while the sum is above e^(largest t − 50); and float32 holds the sum itself down to e^-87.
REACH = tl.constexpr(50.0)
FLOOR = tl.constexpr(-60.0)


@triton.jit(do_not_specialize=["delta_stride", "N", "V", "Q", "parts", "ignore_index"])
def finish_kernel(
    TARGET, Z_T, VALUES, CHANGES, BASE, DELTA, FAR, delta_stride, N, V, Q, parts, ignore_index, epsilon,
    SMOOTHING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BASE (N), DELTA (Q, N), and FAR (Q, N): which changes are so large that their sums have to be taken again."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < N
    kept = inside & (tl.load(TARGET + rows, mask=inside, other=0) != ignore_index)
    z_t = tl.load(Z_T + rows, mask=inside, other=0.0)
    m, rest = _joined(VALUES, z_t, rows, inside, N, parts)
    s = rest + tl.exp(z_t - m)
    base = loss_of_sums(rest, m, z_t)
    if SMOOTHING:
        gaps = _sum(VALUES + 2 * tl.cast(parts, tl.int64) * N, rows, inside, N, parts)
        base += smoothing_term(tl.cast(epsilon, tl.float64), gaps / V)
    tl.store(BASE + rows, tl.where(kept, base, 0.0).to(tl.float32), mask=inside)
    slot = tl.cast(parts, tl.int64) * Q * N
    for q in range(0, Q):
        at = tl.cast(q, tl.int64) * N + rows
        u = _scaled_sum(CHANGES, VALUES, m, at, rows, inside, N, Q, parts)
        after = _scaled_sum(CHANGES + slot, VALUES, m, at, rows, inside, N, Q, parts)
        step = _top(CHANGES + 2 * slot, at, inside, tl.cast(Q, tl.int64) * N, parts)
        small = is_small_change(u, s, step)
        far = kept & ~small & ~_holds(after, step)
        g0, g1 = tl.log(rest) + (m - z_t), tl.log(after) + (m - z_t)
        delta = tl.where(small, small_change(u, s), large_change(g0, g1))
        if SMOOTHING:
            moves = _sum(CHANGES + 3 * slot, at, inside, tl.cast(Q, tl.int64) * N, parts)
            delta += smoothing_term(tl.cast(epsilon, tl.float64), moves / V)
        tl.store(
            DELTA + tl.cast(q, tl.int64) * delta_stride + rows, tl.where(kept, delta, 0.0).to(tl.float32), mask=inside
        )
        tl.store(FAR + at, far.to(tl.int8), mask=inside)


@triton.jit(do_not_specialize=["delta_stride", "N", "V", "Q", "parts"])
def finish_far_kernel(
    Z_T, VALUES, CHANGES, AFTERS, DELTA, FAR, delta_stride, N, V, Q, parts, epsilon,
    SMOOTHING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """DELTA (Q, N) anew where FAR."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    q = tl.program_id(1).to(tl.int64)
    at = q * N + rows
    far = (tl.load(FAR + at, mask=rows < N, other=0) != 0) & (rows < N)
    z_t = tl.load(Z_T + rows, mask=far, other=0.0)
    m, rest = _joined(VALUES, z_t, rows, far, N, parts)
    slot = tl.cast(parts, tl.int64) * Q * N
    top = _top(AFTERS, at, far, tl.cast(Q, tl.int64) * N, parts)
    total = tl.zeros((BLOCK,), tl.float64)
    for p in range(0, parts):
        offs = tl.cast(p, tl.int64) * Q * N + at
        one = tl.load(AFTERS + slot + offs, mask=far, other=0.0).to(tl.float64)
        total += one * tl.exp(tl.load(AFTERS + offs, mask=far, other=0.0).to(tl.float64) - top)
    delta = large_change(tl.log(rest) + (m - z_t), tl.log(total) + top)
    if SMOOTHING:
        moves = _sum(CHANGES + 3 * slot, at, far, tl.cast(Q, tl.int64) * N, parts)
        delta += smoothing_term(tl.cast(epsilon, tl.float64), moves / V)
    tl.store(DELTA + q * delta_stride + rows, delta.to(tl.float32), mask=far)


@triton.jit
def _holds(after, step):
    """Whether the sum after a large change, taken from the logits' maximum, has all its digits."""
    return (step <= LARGEST_EXPM1) & (tl.log(after) > tl.maximum(step - REACH, FLOOR))


@triton.jit
def _joined(VALUES, z_t, rows, inside, N, parts):
    """The largest logit m of all parts, the target's among them, and Σ e^(z−m)."""
    m = tl.maximum(z_t, _top(VALUES, rows, inside, N, parts))
    return m, _scaled_sum(VALUES + tl.cast(parts, tl.int64) * N, VALUES, m, rows, rows, inside, N, 1, parts)


@triton.jit
def _scaled_sum(SUMS, VALUES, m, at, rows, inside, N, Q, parts):
    """Σ over parts of their sums, each brought from its own maximum to `m`."""
    total = tl.zeros_like(m)
    for p in range(0, parts):
        own = tl.load(VALUES + tl.cast(p, tl.int64) * N + rows, mask=inside, other=0.0).to(tl.float64)
        one = tl.load(SUMS + tl.cast(p, tl.int64) * Q * N + at, mask=inside, other=0.0).to(tl.float64)
        total += one * tl.exp(own - m)
    return total


@triton.jit
def _sum(SUMS, at, inside, stride, parts):
    total = tl.zeros(at.shape, tl.float64)
    for p in range(0, parts):
        total += tl.load(SUMS + tl.cast(p, tl.int64) * stride + at, mask=inside, other=0.0).to(tl.float64)
    return total


@triton.jit
def _top(TOPS, at, inside, stride, parts):
    top = tl.full(at.shape, float("-inf"), tl.float64)
    for p in range(0, parts):
        top = tl.maximum(top, tl.load(TOPS + tl.cast(p, tl.int64) * stride + at, mask=inside, other=0.0).to(tl.float64))
    return top
