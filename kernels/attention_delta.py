"""Softmax attention on stacks (value, changes): base output and a query's change in one pass over keys and values.

A program takes a block of rows of one head and one query's changes; keys and values pass by in tiles, as in an online
softmax, and no score is stored. The sums are those of the compiled face (``csrc/cpu/tiles/attention_delta.inl.h``).
With s the scores, m the largest so far, j its key, p = e^(s − m), and g = ds − ds_j what a key gains on j:

    N0 = Σ p v0     N = Σ (p (expm1(g) − b) v0 + p e^g dv)
    D0 = Σ p        D = Σ  p (expm1(g) − b)                  D1 = Σ p e^g

and in the end y = N0 / D0 and its change is (N − y D) / D1, whatever b is; with b near the mean of expm1(g) under p, N
and y D are no large numbers of which little is left. When a tile brings a new j, whose change lies c above the old
one's, the sums follow: with k = e^(m before − m),

    N <- k (e^-c N + (e^-c b + expm1(−c) − new b) N0),  the same with D for N,      D1 <- k e^-c D1.

Weights are rounded to the values' type before they are multiplied, and D0 and D are sums of the same rounded weights.
After a large change, one softmax less the other loses nothing, and a second walk takes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from finf_fast.kernels.numerics import INTERPRETED, expm1, product, rounded, softcap, softcap_change

# Past this gain the second walk is taken. A key whose p is zero in float32, below e^-87, counts for less than e^-27
# after it, and e^64 p stays far inside the range.
LARGEST_GAIN = tl.constexpr(60.0)
CAPPED_GAIN = tl.constexpr(64.0)
# A key this far behind the leading one after the change counts for nothing, however much it has gained.
OUT_OF_SIGHT = tl.constexpr(-40.0)
# Where so little of D0 is left, N − y D is a small difference of large sums.
LEAST_LEFT = tl.constexpr(1.0 / 16)
# Stands in for the m of a row that has seen nothing yet, from which nothing can be taken away.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@dataclass(frozen=True)
class Tile:
    """Rows of queries and keys that a program holds at a time, and its warps and stages of loads."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


@triton.jit
def _rows(X, stride, count, width, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """(BLOCK, WIDTH) of a head's rows from X on; zeros behind `count` rows and `width` numbers."""
    offs, at = tl.arange(0, BLOCK)[:, None], tl.arange(0, WIDTH)[None, :]
    return tl.load(X + offs * stride + at, mask=(offs < count) & (at < width), other=0.0)


@triton.jit
def _hidden(s, MASK, m_t, m_k, first, start, T, TK, CAUSAL: tl.constexpr):
    """Scores with the mask added, -inf where a row may not look; MASK stands at the block's first row, key 0."""
    rows = tl.arange(0, s.shape[0])[:, None]
    keys = start + tl.arange(0, s.shape[1])[None, :]
    inside = keys < TK
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
def _score(q, k, scale):
    return product(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), tl.float32)) * scale


@triton.jit
def _capped(raw, cap):
    return raw if cap is None else softcap(cap, raw)


@triton.jit
def _score_change(raw, dq, q1, k0, dk, scale, cap, Q_MOVES: tl.constexpr, K_MOVES: tl.constexpr):
    """dq k0 + q1 dk, behind the soft cap."""
    ds = tl.zeros_like(raw)
    if Q_MOVES:
        ds = product(dq, tl.trans(k0), ds)
    if K_MOVES:
        ds = product(q1, tl.trans(dk), ds)
    ds *= scale
    return ds if cap is None else softcap_change(cap, raw, ds)


@triton.jit
def _inverse(total):
    """0 for the sum of a row that sees nothing; any other has a leader, which brings 1 to it, or is NaN."""
    return tl.where(total < 1e-37, 0.0, 1.0 / total)


@triton.jit
def _softmax_step(s, v0, dv, m, total, sums, V_MOVES: tl.constexpr):
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


@triton.jit
def _place(pid, blocks, QUERIES, HEADS, BLOCK_M: tl.constexpr):
    """(first row, query, batch and head counted together, batch, head) of a program; all but the first in 64 bits.

    A head's last rows come first: under `causal` theirs are the longest walks.
    """
    head = (pid // blocks // QUERIES).to(tl.int64)
    first = (blocks - 1 - pid % blocks) * BLOCK_M
    return first, (pid // blocks % QUERIES).to(tl.int64), head, head // HEADS, head % HEADS


@triton.jit
def _queries(Q, stride, first, n, q_n, T, E, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, MOVES: tl.constexpr):
    """A block of queries, and its change (itself where queries stand still)."""
    Q += first.to(tl.int64) * stride
    q0 = _rows(Q, stride, T - first, E, BLOCK_M, WIDTH)
    return q0, _rows(Q + (1 + n) * q_n, stride, T - first, E, BLOCK_M, WIDTH) if MOVES else q0


@triton.jit
def _moved(q0, dq, MOVES: tl.constexpr):
    return rounded(q0.to(tl.float32) + dq.to(tl.float32), q0.dtype) if MOVES else q0


@triton.jit
def _attention_delta_kernel(
    Q, K, V, MASK, OUT, LARGE,
    q_n, q_b, q_h, q_t, k_n, k_b, k_h, k_t, v_n, v_b, v_h, v_t, m_b, m_h, m_t, m_k, o_n,
    QUERIES, HEADS, GROUP, T, TK, E, EV, scale, cap,
    CAUSAL: tl.constexpr, Q_MOVES: tl.constexpr, K_MOVES: tl.constexpr, V_MOVES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
):  # fmt: skip
    """The walk: all of the output, and in LARGE which rows need the other kernel."""
    SCORES_MOVE: tl.constexpr = Q_MOVES or K_MOVES
    TYPE: tl.constexpr = V.dtype.element_ty
    first, n, head, b, h = _place(tl.program_id(0), tl.cdiv(T, BLOCK_M), QUERIES, HEADS, BLOCK_M)
    q0, dq = _queries(Q + b * q_b + h * q_h, q_t, first, n, q_n, T, E, BLOCK_M, WIDTH, Q_MOVES)
    q1 = _moved(q0, dq, Q_MOVES and K_MOVES)
    K += b * k_b + h // GROUP * k_h
    V += b * v_b + h // GROUP * v_h
    DK, DV = K + (1 + n) * k_n, V + (1 + n) * v_n
    if MASK is not None:
        MASK += b * m_b + h * m_h + first.to(tl.int64) * m_t
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    d0 = tl.zeros((BLOCK_M,), tl.float32)
    d, d1, bias, shift, large = d0, d0, d0, d0, d0
    N0 = tl.zeros((BLOCK_M, WIDTH_V), tl.float32)
    N = N0
    for start in range(0, min(TK, first + BLOCK_M) if CAUSAL else TK, BLOCK_N):
        count = TK - start
        k0 = _rows(K, k_t, count, E, BLOCK_N, WIDTH)
        v0 = _rows(V, v_t, count, EV, BLOCK_N, WIDTH_V)
        raw = _score(q0, k0, scale)
        s = _hidden(_capped(raw, cap), MASK, m_t, m_k, first, start, T, TK, CAUSAL)
        best, old = tl.max(s, 1), tl.maximum(m, LOWEST)
        turned = best > m
        m = tl.maximum(m, best)
        top = tl.maximum(m, LOWEST)
        shrink = tl.exp(old - top)
        p = tl.exp(s - top[:, None])
        short = rounded(p, TYPE)
        fresh = tl.sum(short.to(tl.float32), 1)
        if SCORES_MOVE:
            dk = _rows(DK, k_t, count, E, BLOCK_N, WIDTH) if K_MOVES else k0
            ds = _score_change(raw, dq, q1, k0, dk, scale, cap, Q_MOVES, K_MOVES)
            # Among keys that lead alike it is the one that gains most.
            lead = tl.max(tl.where(s == m[:, None], ds, float("-inf")), 1)
            back = tl.where(turned, shift - lead, 0.0)
            shift = tl.where(turned, lead, shift)
            g = ds - shift[:, None]
            visible = tl.minimum(g, s - top[:, None] + g + (LARGEST_GAIN - OUT_OF_SIGHT))
            far = (tl.max(visible, 1) > LARGEST_GAIN) | ((back > LARGEST_GAIN) & (d0 > 0))
            large = tl.where(far, 1.0, large)
            gain = p * expm1(tl.where(g > CAPPED_GAIN, CAPPED_GAIN, g))
            back = tl.where(back > CAPPED_GAIN, CAPPED_GAIN, back)
            keep = shrink * tl.exp(back)
            moved = keep * bias + shrink * expm1(back)  # (e^-c b + expm1(-c)) e^(m before - m)
            mean = (keep * d + moved * d0 + tl.sum(gain, 1)) * _inverse(shrink * d0 + fresh)
            bias = tl.where(turned, mean, bias)
            mix = moved - shrink * bias
            w = rounded(gain - bias[:, None] * p, TYPE)
            d = keep * d + mix * d0 + tl.sum(w.to(tl.float32), 1)
            d1 = keep * d1 + tl.sum(p + gain, 1)
            N = product(w, v0, N * keep[:, None] + N0 * mix[:, None])
            after = rounded(p + gain, TYPE)
        else:
            N *= shrink[:, None]
            after = short
        if V_MOVES:
            N = product(after, _rows(DV, v_t, count, EV, BLOCK_N, WIDTH_V), N)
        d0 = d0 * shrink + fresh
        N0 = product(short, v0, N0 * shrink[:, None])
        K += k_t * BLOCK_N
        DK += k_t * BLOCK_N
        V += v_t * BLOCK_N
        DV += v_t * BLOCK_N

    y = N0 * _inverse(d0)[:, None]
    if n == 0:
        _write(OUT, y, head, first, T, EV)
    if SCORES_MOVE:
        _write(OUT + (1 + n) * o_n, (N - y * d[:, None]) * _inverse(d1)[:, None], head, first, T, EV)
        large = tl.where(d1 < LEAST_LEFT * d0, 1.0, large)
        rows = tl.arange(0, BLOCK_M)
        tl.store(LARGE + tl.program_id(0).to(tl.int64) * BLOCK_M + rows, large)
    elif V_MOVES:
        _write(OUT + (1 + n) * o_n, N * _inverse(d0)[:, None], head, first, T, EV)


@triton.jit
def _write(OUT, y, head, first, T, EV, wanted=None):
    """A block of rows, or those of it that are wanted, into a contiguous (B H, T, E')."""
    rows, at = tl.arange(0, y.shape[0])[:, None], tl.arange(0, y.shape[1])[None, :]
    OUT += (head * T + first) * EV
    inside = (rows < T - first) & (at < EV)
    if wanted is not None:
        inside = inside & wanted[:, None]
    tl.store(OUT + rows * EV + at, rounded(y, OUT.dtype.element_ty), mask=inside)


@triton.jit
def _softmax_step(s, v0, dv, m, total, sums, V_MOVES: tl.constexpr):
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


@triton.jit
def _large_change_kernel(
    Q, K, V, MASK, OUT, LARGE,
    q_n, q_b, q_h, q_t, k_n, k_b, k_h, k_t, v_n, v_b, v_h, v_t, m_b, m_h, m_t, m_k, o_n,
    QUERIES, HEADS, GROUP, T, TK, E, EV, scale, cap,
    CAUSAL: tl.constexpr, Q_MOVES: tl.constexpr, K_MOVES: tl.constexpr, V_MOVES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
):  # fmt: skip
    """For the rows that LARGE marks: the output after the change less that before, each by a softmax of its own."""
    large = tl.load(LARGE + tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))
    if tl.max(large, 0) > 0:
        first, n, head, b, h = _place(tl.program_id(0), tl.cdiv(T, BLOCK_M), QUERIES, HEADS, BLOCK_M)
        q0, dq = _queries(Q + b * q_b + h * q_h, q_t, first, n, q_n, T, E, BLOCK_M, WIDTH, Q_MOVES)
        q1 = _moved(q0, dq, Q_MOVES and K_MOVES)
        K += b * k_b + h // GROUP * k_h
        V += b * v_b + h // GROUP * v_h
        DK, DV = K + (1 + n) * k_n, V + (1 + n) * v_n
        if MASK is not None:
            MASK += b * m_b + h * m_h + first.to(tl.int64) * m_t
        m0 = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total0 = tl.zeros((BLOCK_M,), tl.float32)
        sums0 = tl.zeros((BLOCK_M, WIDTH_V), tl.float32)
        m1, total1, sums1 = m0, total0, sums0
        for start in range(0, min(TK, first + BLOCK_M) if CAUSAL else TK, BLOCK_N):
            count = TK - start
            k0 = _rows(K, k_t, count, E, BLOCK_N, WIDTH)
            dk = _rows(DK, k_t, count, E, BLOCK_N, WIDTH) if K_MOVES else k0
            v0 = _rows(V, v_t, count, EV, BLOCK_N, WIDTH_V)
            dv = _rows(DV, v_t, count, EV, BLOCK_N, WIDTH_V) if V_MOVES else v0
            raw = _score(q0, k0, scale)
            s = _hidden(_capped(raw, cap), MASK, m_t, m_k, first, start, T, TK, CAUSAL)
            m0, total0, sums0 = _softmax_step(s, v0, dv, m0, total0, sums0, False)
            s += _score_change(raw, dq, q1, k0, dk, scale, cap, Q_MOVES, K_MOVES)
            m1, total1, sums1 = _softmax_step(s, v0, dv, m1, total1, sums1, V_MOVES)
            K += k_t * BLOCK_N
            DK += k_t * BLOCK_N
            V += v_t * BLOCK_N
            DV += v_t * BLOCK_N
        change = sums1 * _inverse(total1)[:, None] - sums0 * _inverse(total0)[:, None]
        _write(OUT + (1 + n) * o_n, change, head, first, T, EV, large > 0)


def attention_delta(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, causal: bool, scale: float, mask: Tensor | None, cap: float | None
) -> None:
    """Fill `out` (1+Q, B, H, T, E'), contiguous. As `finf_fast.ops.attention_delta`.

    Args:
        q: (1+Q, B, H, T, E) or leading size 1, last stride 1, as have k and v; float32 or bfloat16.
        k: (1+Q, B, H', T', E) or leading size 1.
        v: (1+Q, B, H', T', E') or leading size 1.
        out: q's dtype.
        mask: (B, H, T, T') of any strides, bool or floating, or None.
    """
    (_, B, H, T, E), TK, EV, queries = q.shape, k.shape[3], v.shape[4], max(len(out) - 1, 1)
    tile = _tile(q, E, EV)
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    blocks = triton.cdiv(T, tile.BLOCK_M) * queries * B * H
    moves = {"Q_MOVES": len(q) > 1, "K_MOVES": len(k) > 1, "V_MOVES": len(v) > 1}
    # Looked into on the device alone: the second kernel is always launched, and mostly returns at once.
    large = torch.empty(blocks * tile.BLOCK_M, dtype=torch.float32, device=q.device)
    for kernel in (_attention_delta_kernel, _large_change_kernel)[: 1 + (len(q) > 1 or len(k) > 1)]:
        kernel[(blocks,)](
            *(q, k, v, mask, out, large, *q.stride()[:4], *k.stride()[:4], *v.stride()[:4]),
            *(mask.stride() if mask is not None else (0, 0, 0, 0)),
            *(out.stride(0), queries, H, H // k.shape[2], T, TK, E, EV, scale, cap),
            **moves,
            CAUSAL=causal,
            BLOCK_M=tile.BLOCK_M,
            BLOCK_N=tile.BLOCK_N,
            WIDTH=width(E),
            WIDTH_V=width(EV),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def width(E: int) -> int:
    """Numbers of a head that a tile holds: a power of two from 16, the least that a product takes."""
    return max(16, triton.next_power_of_2(E))


def _tile(q: Tensor, E: int, EV: int) -> Tile:
    return Tile(64, 64, 4, 2)
