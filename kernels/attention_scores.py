"""What attention_delta's kernels share: where a program's rows lie, scores and their changes, a softmax's step.

Queries, keys and values come in blocks and tiles of rows, padded with zeros to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from finf_fast.kernels.numerics import product, rounded, softcap, softcap_change

# Stands in for the m of a row that has seen nothing yet, from which nothing can be taken away.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# Numbers of a head's width taken at a time where a thread would otherwise hold all of them.
PIECE = tl.constexpr(32)


@triton.jit
def place(pid, blocks, QUERIES, HEADS, BLOCK_M: tl.constexpr):
    """(first row, query, batch and head counted together, batch, head) of a program; all but the first in 64 bits.

    A head's last rows come first: under `causal` theirs are the longest walks.
    """
    head = (pid // blocks // QUERIES).to(tl.int64)
    first = (blocks - 1 - pid % blocks) * BLOCK_M
    return first, (pid // blocks % QUERIES).to(tl.int64), head, head // HEADS, head % HEADS


@triton.jit
def keys_seen(FIRST, END, first, T, TK, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr):
    """First and one past last key that some row of the block sees, as far as texts and `causal` tell."""
    begin, end = 0, TK
    if FIRST is not None:
        begin, end = tl.load(FIRST + first), tl.load(END + min(first + BLOCK_M, T) - 1)
    if CAUSAL:
        end = min(end, first + BLOCK_M)
    return begin, end


@triton.jit
def load_rows(X, stride, count, width, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """(BLOCK, WIDTH) of a head's rows from X on; zeros behind `count` rows and `width` numbers."""
    offs, at = tl.arange(0, BLOCK)[:, None], tl.arange(0, WIDTH)[None, :]
    return tl.load(X + offs * stride + at, mask=(offs < count) & (at < width), other=0.0)


@triton.jit
def write(OUT, y, head, first, T, EV, wanted=None):
    """A block of rows, or those of it that are wanted, into a contiguous (B H, T, E')."""
    rows, at = tl.arange(0, y.shape[0])[:, None], tl.arange(0, y.shape[1])[None, :]
    inside = (rows < T - first) & (at < EV)
    if wanted is not None:
        inside = inside & wanted[:, None]
    tl.store(OUT + (head * T + first) * EV + rows * EV + at, rounded(y, OUT.dtype.element_ty), mask=inside)


@triton.jit
def load_block(Y, head, first, T, EV, BLOCK_M: tl.constexpr, WIDTH_V: tl.constexpr):
    """A block of rows out of a contiguous (B H, T, E')."""
    return load_rows(Y + (head * T + first) * EV, EV, T - first, EV, BLOCK_M, WIDTH_V)


@triton.jit
def load_numbers(X, head, first, T, BLOCK_M: tl.constexpr):
    """One number for each row of a block, out of (B H, T)."""
    rows = first + tl.arange(0, BLOCK_M)
    return tl.load(X + head * T + rows, mask=rows < T, other=0)


@triton.jit
def store_numbers(X, x, head, first, T):
    rows = first + tl.arange(0, x.shape[0])
    tl.store(X + head * T + rows, x, mask=rows < T)


@triton.jit
def moved(q0, dq, MOVES: tl.constexpr):
    """q1, rounded to the type in which it is multiplied."""
    return rounded(q0.to(tl.float32) + dq.to(tl.float32), q0.dtype) if MOVES else q0


@triton.jit
def score(q, k, scale):
    """(rows, keys), before soft cap and mask."""
    return product(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), tl.float32)) * scale


@triton.jit
def capped(raw, cap):
    return raw if cap is None else softcap(cap, raw)


@triton.jit
def hidden(s, MASK, FIRST, END, m_t, m_k, first, start, T, TK, CAUSAL: tl.constexpr):
    """Scores with the mask added, -inf where a row may not look; MASK stands at the block's first row, key 0."""
    rows = tl.arange(0, s.shape[0])[:, None]
    keys = start + tl.arange(0, s.shape[1])[None, :]
    inside = keys < TK
    if FIRST is not None:
        there = first + rows < T
        inside = keys < tl.load(END + first + rows, mask=there, other=0)
        inside = inside & (keys >= tl.load(FIRST + first + rows, mask=there, other=0))
    if MASK is not None:
        # 64 bits, since the mask of a long text passes 2^31 numbers
        at = rows * m_t + keys.to(tl.int64) * m_k
        mask = tl.load(MASK + at, mask=inside & (first + rows < T), other=0)
        if MASK.dtype.element_ty == tl.uint8:
            inside = inside & (mask != 0)
        else:
            s += mask.to(tl.float32)
    if CAUSAL:
        inside = inside & (keys <= first + rows)
    return tl.where(inside, s, float("-inf"))


@triton.jit
def capped_change(raw, ds, cap):
    return ds if cap is None else softcap_change(cap, raw, ds)


@triton.jit
def score_change(dq, q1, k0, dk, scale, Q_MOVES: tl.constexpr, K_MOVES: tl.constexpr):
    """dq k0 + q1 dk, before the soft cap."""
    ds = tl.zeros((q1.shape[0], k0.shape[0]), tl.float32)
    if Q_MOVES:
        ds = product(dq, tl.trans(k0), ds)
    if K_MOVES:
        ds = product(q1, tl.trans(dk), ds)
    return ds * scale


@triton.jit
def scores_by_pieces(
    Q, DQ, K, DK, q_t, k_t, rows, count, E, scale,
    Q_MOVES: tl.constexpr, K_MOVES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scores and their changes in float32, some numbers of the width at a time.

    Multiply-adds hold the operands of a product in registers, which queries of a whole width would fill.
    """
    raw = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    ds = raw
    for e in range(0, E, PIECE):
        q = load_rows(Q + e, q_t, rows, E - e, BLOCK_M, PIECE)
        k = load_rows(K + e, k_t, count, E - e, BLOCK_N, PIECE)
        raw = product(q, tl.trans(k), raw)
        if Q_MOVES:
            dq = load_rows(DQ + e, q_t, rows, E - e, BLOCK_M, PIECE)
            ds = product(dq, tl.trans(k), ds)
            q += dq
        if K_MOVES:
            ds = product(q, tl.trans(load_rows(DK + e, k_t, count, E - e, BLOCK_N, PIECE)), ds)
    return raw * scale, ds * scale


@triton.jit
def leader_change(
    Q, DQ, K, DK, q_t, k_t, leader, count, E, scale, cap,
    Q_MOVES: tl.constexpr, K_MOVES: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """ds_j of each row, some numbers of its width at a time: a whole block in float32 would fill the registers."""
    rows = tl.arange(0, BLOCK_M)[:, None]
    raw, ds = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for e in range(0, E, PIECE):
        at = e + tl.arange(0, PIECE)[None, :]
        inside = (rows < count) & (at < E)
        key = leader.to(tl.int64)[:, None] * k_t + at
        q = tl.load(Q + rows * q_t + at, mask=inside, other=0.0).to(tl.float32)
        k = tl.load(K + key, mask=inside, other=0.0).to(tl.float32)
        raw += tl.sum(q * k, 1)
        if Q_MOVES:
            dq = tl.load(DQ + rows * q_t + at, mask=inside, other=0.0).to(tl.float32)
            ds += tl.sum(dq * k, 1)
            q = rounded(q + dq, Q.dtype.element_ty).to(
                tl.float32
            )  # as it is multiplied, or j would gain the difference
        if K_MOVES:
            ds += tl.sum(q * tl.load(DK + key, mask=inside, other=0.0).to(tl.float32), 1)
    return capped_change(raw * scale, ds * scale, cap)


@triton.jit
def inverse(total):
    """0 for the sum of a row that sees nothing; any other has a leader, which brings 1 to it, or is NaN."""
    return tl.where(total < 1e-37, 0.0, 1.0 / total)


@triton.jit
def softmax_step(s, v0, dv, m, total, sums, V_MOVES: tl.constexpr):
    """A tile's share in an online softmax with the values v0 (+ dv); largest score, sum and weighted values follow."""
    old = tl.maximum(m, LOWEST)
    m = tl.maximum(m, tl.max(s, 1))
    top = tl.maximum(m, LOWEST)
    shrink = tl.exp(old - top)
    p = rounded(tl.exp(s - top[:, None]), v0.dtype)
    sums = product(p, v0, sums * shrink[:, None])
    if V_MOVES:
        sums = product(p, dv, sums)
    return m, total * shrink + tl.sum(p.to(tl.float32), 1), sums
