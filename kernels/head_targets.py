"""What linear_cross_entropy_delta knows before it walks the vocabulary: each target's logit, its change, and what goes
through the inner side of a low-rank change."""

from __future__ import annotations

import triton
import triton.language as tl

from finf_fast.kernels.numerics import softcap, softcap_change


@triton.jit(do_not_specialize=["N", "Q"])
def inner_kernel(
    X, DX, R, INNER, x_stride, dx_stride, N, D, Q, rank,
    HALVES: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """INNER (HALVES, Q, N, rank) = (x + dx_q) R_q, R (Q, D, rank): float32, or bfloat16 and what that leaves of it."""
    q, first = tl.program_id(1), tl.program_id(2) * RANK
    rows, ranks = tl.program_id(0) * ROWS + tl.arange(0, ROWS), first + tl.arange(0, RANK)
    acc = tl.zeros((ROWS, RANK), tl.float32)
    for k in range(0, D, DEPTH):
        offs_k = k + tl.arange(0, DEPTH)
        inside = (rows < N)[:, None] & (offs_k < D)[None, :]
        x = tl.load(X + rows.to(tl.int64)[:, None] * x_stride + offs_k[None, :], mask=inside, other=0.0).to(tl.float32)
        if DX is not None:
            at = (tl.cast(q, tl.int64) * N + rows)[:, None] * dx_stride + offs_k[None, :]
            x += tl.load(DX + at, mask=inside, other=0.0).to(tl.float32)
        at = (tl.cast(q, tl.int64) * D + offs_k)[:, None] * rank + ranks[None, :]
        r = tl.load(R + at, mask=(offs_k < D)[:, None] & (ranks < rank)[None, :], other=0.0)
        acc = tl.dot(x, r, acc, input_precision="ieee")
    at = (tl.cast(q, tl.int64) * N + rows)[:, None] * rank + ranks[None, :]
    inside = (rows < N)[:, None] & (ranks < rank)[None, :]
    for half in tl.static_range(HALVES):
        part = acc.to(INNER.dtype.element_ty)
        tl.store(INNER + half * (tl.cast(Q, tl.int64) * N * rank) + at, part, mask=inside)
        acc -= part.to(tl.float32)


@triton.jit(do_not_specialize=["N", "V", "Q", "x1_rows", "ignore_index"])
def target_kernel(
    X, DX, W, CENTRE, X1, DW, INNER, U, BIAS, DB, TARGET, Z_T, D_T,
    x_stride, dx_stride, w_stride, x1_stride, x1_rows, dw_stride, N, D, V, Q, rank, cap, ignore_index,
    SOFTCAP: tl.constexpr, HALVES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Z_T (N) float64 and D_T (Q, N) float32 of one row: an error here would be one of all the row's weights."""
    n = tl.program_id(0).to(tl.int64)
    t = tl.load(TARGET + n)
    t = tl.where(t == ignore_index, 0, t)
    z = _row_product(X + n * x_stride, W + t * w_stride, CENTRE, D, BLOCK)
    if BIAS is not None:
        z += tl.load(BIAS + t).to(tl.float64)
    tl.store(Z_T + n, softcap(tl.cast(cap, tl.float64), z) if SOFTCAP else z)
    for q in range(0, Q):
        at, v = tl.cast(q, tl.int64) * N + n, tl.cast(q, tl.int64) * V + t
        d = tl.zeros((), tl.float64)
        if DX is not None:
            d += _row_product(DX + at * dx_stride, W + t * w_stride, CENTRE, D, BLOCK)
        if DW is not None:
            d += _row_product(X1 + (tl.cast(q, tl.int64) * x1_rows + n) * x1_stride, DW + v * dw_stride, None, D, BLOCK)
        if U is not None:
            for half in tl.static_range(HALVES):
                inner = INNER + (half * tl.cast(Q, tl.int64) * N + at) * rank
                d += _row_product(inner, U + v * rank, None, rank, BLOCK)
        if DB is not None:
            d += tl.load(DB + v).to(tl.float64)
        d = softcap_change(tl.cast(cap, tl.float64), z, d) if SOFTCAP else d
        tl.store(D_T + at, d.to(tl.float32))


@triton.jit
def _row_product(A, B, CENTRE, depth, BLOCK: tl.constexpr):
    """Σ a_k (b_k − centre_k) in float64."""
    total = tl.zeros((BLOCK,), tl.float64)
    for k in range(0, depth, BLOCK):
        offs = k + tl.arange(0, BLOCK)
        a = tl.load(A + offs, mask=offs < depth, other=0.0)
        b = tl.load(B + offs, mask=offs < depth, other=0.0)
        if CENTRE is not None:
            b -= tl.load(CENTRE + offs, mask=offs < depth, other=0.0)
        total += a.to(tl.float64) * b.to(tl.float64)
    return tl.sum(total, 0)
