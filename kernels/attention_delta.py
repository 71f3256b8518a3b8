"""Softmax attention on stacks (value, changes), flash style: no score is stored.

With s the scores, m the largest of a row, j its key, p = e^(s − m), D0 = Σ p, and g = ds − ds_j what a key gains on j,
the changes' own numbers are

    N = Σ (p (expm1(g) − b) v0 + p e^g dv)     D = Σ p (expm1(g) − b)     D1 = Σ p e^g     y = Σ p v0 / D0

and the change of y is (N − y D) / D1, whatever b is. A softmax does not feel that g is counted from j; j itself then
gains as good as nothing, so that a row which looks at hardly anything else keeps the digits of what little moves. With
b near the mean of expm1(g) under p, N and y D are no large numbers of which little is left.

Three kernels, a block of rows of one head each:

1. the value: y, m, D0 and j, by an online softmax, once for all queries;
2. a query's change: with m and j known nothing has to be taken back, and N is the only large sum, which leaves room in
   the registers for heads of 128;
3. after a large change, which the second marks by row: one softmax less the other, which then loses nothing.

Weights are rounded to the values' type before they are multiplied, and D0 and D are sums of the same rounded weights.
The compiled face does the same in one walk (``csrc/cpu/tiles/attention_delta.inl.h``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from finf_fast.kernels.attention_scores import (
    LOWEST,
    capped,
    capped_change,
    hidden,
    inverse,
    keys_seen,
    leader_change,
    load_block,
    load_numbers,
    load_rows,
    moved,
    place,
    score,
    score_change,
    scores_by_pieces,
    softmax_step,
    store_numbers,
    write,
)
from finf_fast.kernels.attention_tiles import TILES, registers, width
from finf_fast.kernels.configurations import OPTIONS, architecture, settings_for
from finf_fast.kernels.layouts import aligned
from finf_fast.kernels.numerics import expm1, product, rounded

# Past this gain the third kernel takes the row. A key whose p is zero in float32, below e^-87, counts for less than
# e^-27 after it, and e^64 p stays far inside the range.
LARGEST_GAIN = tl.constexpr(60.0)
CAPPED_GAIN = tl.constexpr(64.0)
# A key this far behind the leading one after the change counts for nothing, however much it has gained.
OUT_OF_SIGHT = tl.constexpr(-40.0)
# Where so little of D0 is left, N − y D is a small difference of large sums.
LEAST_LEFT = tl.constexpr(1.0 / 16)
# A row's first tile tells b where it holds this share of all weights at least: 32 keys do among 2^15 alike.
LEAST_SHARE = tl.constexpr(1.0 / 1024)


@triton.jit(do_not_specialize=["HEADS", "GROUP", "T", "TK"])
def value_kernel(
    Q, K, V, MASK, FIRST, END, OUT, Y, TOP, TOTAL, LEADER,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, m_b, m_h, m_t, m_k, HEADS, GROUP, T, TK, E, EV, scale, cap,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
):  # fmt: skip
    first, _, head, b, h = place(tl.program_id(0), tl.cdiv(T, BLOCK_M), 1, HEADS, BLOCK_M)
    q = load_rows(Q + b * q_b + h * q_h + first.to(tl.int64) * q_t, q_t, T - first, E, BLOCK_M, WIDTH)
    K += b * k_b + h // GROUP * k_h
    V += b * v_b + h // GROUP * v_h
    if MASK is not None:
        MASK += b * m_b + h * m_h + first.to(tl.int64) * m_t
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    leader = tl.zeros((BLOCK_M,), tl.int32)
    sums = tl.zeros((BLOCK_M, WIDTH_V), tl.float32)
    begin, end = keys_seen(FIRST, END, first, T, TK, BLOCK_M, CAUSAL)
    skipped = tl.cast(begin, tl.int64)
    K += skipped * k_t
    V += skipped * v_t
    for start in range(begin, end, BLOCK_N):
        k = load_rows(K, k_t, TK - start, E, BLOCK_N, WIDTH)
        v = load_rows(V, v_t, TK - start, EV, BLOCK_N, WIDTH_V)
        s = hidden(capped(score(q, k, scale), cap), MASK, FIRST, END, m_t, m_k, first, start, T, TK, CAUSAL)
        best = tl.max(s, 1)
        keys = start + tl.arange(0, BLOCK_N)[None, :]
        leader = tl.where(best > m, tl.max(tl.where(s == best[:, None], keys, 0), 1), leader)
        m, total, sums = softmax_step(s, v, v, m, total, sums, False)
        K += k_t * BLOCK_N
        V += v_t * BLOCK_N
    y = sums * inverse(total)[:, None]
    write(Y, y, head, first, T, EV)
    if OUT.dtype != Y.dtype:
        write(OUT, y, head, first, T, EV)
    store_numbers(TOP, m, head, first, T)
    store_numbers(TOTAL, total, head, first, T)
    store_numbers(LEADER, leader, head, first, T)


@triton.jit(do_not_specialize=["QUERIES", "HEADS", "GROUP", "T", "TK"])
def change_kernel(
    Q, K, V, MASK, FIRST, END, OUT, Y, TOP, TOTAL, LEADER, LARGE,
    q_n, q_b, q_h, q_t, k_n, k_b, k_h, k_t, v_n, v_b, v_h, v_t, m_b, m_h, m_t, m_k, o_n,
    QUERIES, HEADS, GROUP, T, TK, E, EV, scale, cap,
    CAUSAL: tl.constexpr, Q_MOVES: tl.constexpr, K_MOVES: tl.constexpr, V_MOVES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
):  # fmt: skip
    SCORES_MOVE: tl.constexpr = Q_MOVES or K_MOVES
    LONG: tl.constexpr = Q.dtype.element_ty == tl.float32
    first, n, head, b, h = place(tl.program_id(0), tl.cdiv(T, BLOCK_M), QUERIES, HEADS, BLOCK_M)
    Q += b * q_b + h * q_h + first.to(tl.int64) * q_t
    K += b * k_b + h // GROUP * k_h
    V += b * v_b + h // GROUP * v_h
    DK, DV = K + (1 + n) * k_n, V + (1 + n) * v_n
    if MASK is not None:
        MASK += b * m_b + h * m_h + first.to(tl.int64) * m_t
    DQ, rows = Q + (1 + n) * q_n, T - first
    if not LONG:
        q0 = load_rows(Q, q_t, rows, E, BLOCK_M, WIDTH)
        dq = load_rows(DQ, q_t, rows, E, BLOCK_M, WIDTH) if Q_MOVES else q0
        q1 = moved(q0, dq, Q_MOVES and K_MOVES)
    top = tl.maximum(load_numbers(TOP, head, first, T, BLOCK_M), LOWEST)
    d0 = load_numbers(TOTAL, head, first, T, BLOCK_M)
    d, d1, bias, seen = tl.zeros_like(d0), tl.zeros_like(d0), tl.zeros_like(d0), tl.zeros_like(d0)
    if SCORES_MOVE:
        leader = load_numbers(LEADER, head, first, T, BLOCK_M)
        shift = leader_change(Q, DQ, K, DK, q_t, k_t, leader, rows, E, scale, cap, Q_MOVES, K_MOVES, BLOCK_M)
    N = tl.zeros((BLOCK_M, WIDTH_V), tl.float32)
    begin, end = keys_seen(FIRST, END, first, T, TK, BLOCK_M, CAUSAL)
    skipped = tl.cast(begin, tl.int64)
    K += skipped * k_t
    DK += skipped * k_t
    V += skipped * v_t
    DV += skipped * v_t
    for start in range(begin, end, BLOCK_N):
        count = TK - start
        if LONG:
            raw, ds = scores_by_pieces(
                Q, DQ, K, DK, q_t, k_t, rows, count, E, scale, Q_MOVES, K_MOVES, BLOCK_M, BLOCK_N
            )  # fmt: skip
        else:
            k0 = load_rows(K, k_t, count, E, BLOCK_N, WIDTH)
            dk = load_rows(DK, k_t, count, E, BLOCK_N, WIDTH) if K_MOVES else k0
            raw, ds = score(q0, k0, scale), score_change(dq, q1, k0, dk, scale, Q_MOVES, K_MOVES)
        s = hidden(capped(raw, cap), MASK, FIRST, END, m_t, m_k, first, start, T, TK, CAUSAL) - top[:, None]
        p = tl.exp(s)
        after = p
        if SCORES_MOVE:
            v0 = load_rows(V, v_t, count, EV, BLOCK_N, WIDTH_V)
            g = capped_change(raw, ds, cap) - shift[:, None]
            visible = tl.max(tl.minimum(g, s + g + (LARGEST_GAIN - OUT_OF_SIGHT)), 1)
            gain = p * expm1(tl.where(g > CAPPED_GAIN, CAPPED_GAIN, g))
            after = p + gain
            bias = tl.where(seen > 0, bias, _first_mean(tl.sum(gain, 1), tl.sum(p, 1), d0))
            seen += tl.sum(p, 1)
            w = rounded(gain - bias[:, None] * p, V.dtype.element_ty)
            d += tl.sum(w.to(tl.float32), 1)
            d1 = tl.where(visible > LARGEST_GAIN, float("-inf"), d1 + tl.sum(after, 1))
            N = product(w, v0, N)
        if V_MOVES:
            dv = load_rows(DV, v_t, count, EV, BLOCK_N, WIDTH_V)
            N = product(rounded(after, V.dtype.element_ty), dv, N)
        K += k_t * BLOCK_N
        DK += k_t * BLOCK_N
        V += v_t * BLOCK_N
        DV += v_t * BLOCK_N
    OUT += (1 + n) * o_n
    if SCORES_MOVE:
        y = load_block(Y, head, first, T, EV, BLOCK_M, WIDTH_V)
        write(OUT, (N - y * d[:, None]) * inverse(d1)[:, None], head, first, T, EV)
        large = tl.where(d1 < d0 * LEAST_LEFT, 1.0, 0.0)
        tl.store(LARGE + tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), large)
    else:
        write(OUT, N * inverse(d0)[:, None], head, first, T, EV)


@triton.jit
def _first_mean(gained, p, total):
    """b from a row's first tile: its mean of expm1(g), or 0 where the tile holds next to nothing of the row's weight.

    In the measure in which the leading key, with its gain of 0, has the row for itself, b goes to 0 too.
    """
    return tl.where(p > total * LEAST_SHARE, gained / p * (1.0 - 1.0 / total), 0.0)


@triton.jit(do_not_specialize=["QUERIES", "HEADS", "GROUP", "T", "TK"])
def large_change_kernel(
    Q, K, V, MASK, FIRST, END, OUT, Y, TOP, TOTAL, LEADER, LARGE,
    q_n, q_b, q_h, q_t, k_n, k_b, k_h, k_t, v_n, v_b, v_h, v_t, m_b, m_h, m_t, m_k, o_n,
    QUERIES, HEADS, GROUP, T, TK, E, EV, scale, cap,
    CAUSAL: tl.constexpr, Q_MOVES: tl.constexpr, K_MOVES: tl.constexpr, V_MOVES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
):  # fmt: skip
    """For the rows that LARGE marks: the output after the change less that before."""
    LONG: tl.constexpr = Q.dtype.element_ty == tl.float32
    large = tl.load(LARGE + tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))
    if tl.max(large, 0) > 0:
        first, n, head, b, h = place(tl.program_id(0), tl.cdiv(T, BLOCK_M), QUERIES, HEADS, BLOCK_M)
        Q += b * q_b + h * q_h + first.to(tl.int64) * q_t
        K += b * k_b + h // GROUP * k_h
        V += b * v_b + h // GROUP * v_h
        DK, DV = K + (1 + n) * k_n, V + (1 + n) * v_n
        if MASK is not None:
            MASK += b * m_b + h * m_h + first.to(tl.int64) * m_t
        DQ, rows = Q + (1 + n) * q_n, T - first
        if not LONG:
            q0 = load_rows(Q, q_t, rows, E, BLOCK_M, WIDTH)
            dq = load_rows(DQ, q_t, rows, E, BLOCK_M, WIDTH) if Q_MOVES else q0
            q1 = moved(q0, dq, Q_MOVES and K_MOVES)
        m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        sums = tl.zeros((BLOCK_M, WIDTH_V), tl.float32)
        begin, end = keys_seen(FIRST, END, first, T, TK, BLOCK_M, CAUSAL)
        skipped = tl.cast(begin, tl.int64)
        K += skipped * k_t
        DK += skipped * k_t
        V += skipped * v_t
        DV += skipped * v_t
        for start in range(begin, end, BLOCK_N):
            count = TK - start
            v0 = load_rows(V, v_t, count, EV, BLOCK_N, WIDTH_V)
            dv = load_rows(DV, v_t, count, EV, BLOCK_N, WIDTH_V) if V_MOVES else v0
            if LONG:
                raw, ds = scores_by_pieces(
                    Q, DQ, K, DK, q_t, k_t, rows, count, E, scale, Q_MOVES, K_MOVES, BLOCK_M, BLOCK_N
                )  # fmt: skip
            else:
                k0 = load_rows(K, k_t, count, E, BLOCK_N, WIDTH)
                dk = load_rows(DK, k_t, count, E, BLOCK_N, WIDTH) if K_MOVES else k0
                raw, ds = score(q0, k0, scale), score_change(dq, q1, k0, dk, scale, Q_MOVES, K_MOVES)
            s = hidden(capped(raw, cap), MASK, FIRST, END, m_t, m_k, first, start, T, TK, CAUSAL)
            s += capped_change(raw, ds, cap)
            m, total, sums = softmax_step(s, v0, dv, m, total, sums, V_MOVES)
            K += k_t * BLOCK_N
            DK += k_t * BLOCK_N
            V += v_t * BLOCK_N
            DV += v_t * BLOCK_N
        y = load_block(Y, head, first, T, EV, BLOCK_M, WIDTH_V)
        write(OUT + (1 + n) * o_n, sums * inverse(total)[:, None] - y, head, first, T, EV, large > 0)


def attention_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    *,
    causal: bool,
    scale: float,
    mask: Tensor | None,
    cap: float | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Fill `out` (1+Q, B, H, T, E'), contiguous. As `finf_fast.ops.attention_delta`.

    Heads whose widths are no multiples of 16, and what else cannot be read at full speed as it lies, are copied.

    Args:
        q: (1+Q, B, H, T, E) or leading size 1, of any strides, as k and v; float32 or bfloat16.
        k: (1+Q, B, H', T', E) or leading size 1.
        v: (1+Q, B, H', T', E') or leading size 1.
        out: q's dtype.
        mask: (B, H, T, T') of any strides, bool or floating, or None.
        cu_seqlens: (S+1,) from 0 to T, or None; nothing is read from elsewhere if it is not that.
    """
    q, k, v = aligned(q), aligned(k), aligned(v)
    EV, whole = out.shape[4], v.shape[4]
    room = out if whole == EV else out.new_empty(*out.shape[:4], whole)
    texts = (None, None) if cu_seqlens is None else _texts(cu_seqlens, out.shape[3])
    _launch(q, k, v, room, causal, scale, mask, cap, texts)
    if room is not out:
        out.copy_(room[..., :EV])


def _texts(cu_seqlens: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """(T,) int32 each: where the text of every row begins, and one past its end."""
    rows = torch.arange(T, device=cu_seqlens.device)
    text = (torch.searchsorted(cu_seqlens, rows.to(cu_seqlens.dtype), right=True) - 1).clamp_(0, len(cu_seqlens) - 2)
    edges = cu_seqlens.to(torch.int32).clamp(0, T)
    return edges[text], edges[text + 1]


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    causal: bool,
    scale: float,
    mask: Tensor | None,
    cap: float | None,
    texts: tuple[Tensor | None, Tensor | None],
) -> None:
    (_, B, H, T, E), TK, EV = q.shape, k.shape[3], v.shape[4]
    busy = mask is not None or cap is not None or texts[0] is not None
    tile = settings_for(TILES, architecture(q.device)).of(q.dtype, max(E, EV), busy)
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    blocks, Q = triton.cdiv(T, tile.BLOCK_M) * B * H, len(out) - 1
    y = out[0] if out.dtype == torch.float32 else torch.empty(out.shape[1:], dtype=torch.float32, device=q.device)
    top, total = (torch.empty(B * H * T, dtype=torch.float32, device=q.device) for _ in range(2))
    leader = torch.empty(B * H * T, dtype=torch.int32, device=q.device)
    places = mask.stride() if mask is not None else (0, 0, 0, 0)
    numbers = (H, H // k.shape[2], T, TK, E, EV, scale, cap)
    shape = {
        "CAUSAL": causal,
        "BLOCK_M": tile.BLOCK_M,
        "BLOCK_N": tile.BLOCK_N,
        "WIDTH": width(E),
        "WIDTH_V": width(EV),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **OPTIONS,
        **registers(architecture(q.device), q.dtype, max(width(E), width(EV)), tile),
    }
    strides = (*q.stride()[1:4], *k.stride()[1:4], *v.stride()[1:4], *places)
    value_kernel[(blocks,)](q, k, v, mask, *texts, out, y, top, total, leader, *strides, *numbers, **shape)
    if not Q:
        return
    moves = {"Q_MOVES": len(q) > 1, "K_MOVES": len(k) > 1, "V_MOVES": len(v) > 1}
    strides = (*q.stride()[:4], *k.stride()[:4], *v.stride()[:4], *places, out.stride(0))
    large = torch.empty(Q * blocks * tile.BLOCK_M, dtype=torch.float32, device=q.device)
    # The third kernel looks on the device whether it is needed, and mostly returns at once.
    for kernel in (change_kernel, large_change_kernel)[: 1 + (moves["Q_MOVES"] or moves["K_MOVES"])]:
        kernel[(Q * blocks,)](
            *(q, k, v, mask, *texts, out, y, top, total, leader, large, *strides, Q, *numbers), **moves, **shape
        )
