"""The walk of linear_cross_entropy_delta over the vocabulary: products, and what is summed up of them, tile by tile.

A program holds a block of rows and walks one part of the vocabulary. Of one query (PAIRED) its sums stay in registers;
of more they lie where they are to end up, in CHANGES, and are loaded and stored beside each tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from finf_fast.kernels.numerics import expm1_beside, softcap, softcap_change
from finf_fast.kernels.tiles import add_product, paired_product

LOWEST = tl.constexpr(-3.4e38)  # below every logit, and no infinity: a difference from it is no NaN
# In the place of e^(z−m): a column that counts for nothing, 1e-10 of any sum that is used. A mask kept beside e would
# take as many registers again.
ASIDE = tl.constexpr(-1e-37)


@triton.jit(do_not_specialize=["N", "V", "Q", "x1_rows", "parts", "tiles_a_part", "group"])
def sums_kernel(
    X, DX, W, CENTRE, X1, DW, INNER, U, BIAS, DB, TARGET, Z_T, D_T, FAR, VALUES, CHANGES,
    x_stride, dx_stride, w_stride, x1_stride, x1_rows, dw_stride, N, D, V, Q, rank,
    parts, tiles_a_part, group, cap,
    AFTER: tl.constexpr, PAIRED: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, HALVES: tl.constexpr,
    DESCRIPTORS: tl.constexpr, INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """VALUES and CHANGES of a block of rows and a part of the vocabulary; AFTER: AFTERS of a block with FAR rows."""
    block, part = _place(tl.cdiv(N, ROWS), parts, group)
    row = block * ROWS
    rows = row + tl.arange(0, ROWS)
    inside = rows < N
    if AFTER:  # noqa: SIM102  the one if is the compiler's, the other the device's
        if not _any(FAR, rows, inside, N, Q):
            return
    t = tl.load(TARGET + rows, mask=inside, other=-1).to(tl.int32)
    z_t = tl.load(Z_T + rows, mask=inside, other=0.0).to(tl.float32)
    m, rest, gaps = tl.full((ROWS,), LOWEST, tl.float32), tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    a, b, c, moves = _start(AFTER, ROWS)  # of the one query
    first, last = part * tiles_a_part, tl.minimum((part + 1) * tiles_a_part, tl.cdiv(V, COLUMNS))
    for j in range(first, last):
        start = j * COLUMNS
        columns = start + tl.arange(0, COLUMNS)
        aside = (columns >= V)[None, :] | (columns[None, :] == t[:, None])
        if PAIRED:
            z, d = paired_product(
                X, x_stride, DX, dx_stride, row, N, W, w_stride, start, V, CENTRE, D,
                ROWS, COLUMNS, DEPTH, DESCRIPTORS, INTERPRETED,
            )  # fmt: skip
        else:
            z = add_product(
                tl.zeros((ROWS, COLUMNS), tl.float32), X, x_stride, row, N, W, w_stride, start, V, CENTRE, D,
                ROWS, COLUMNS, DEPTH, DESCRIPTORS, INTERPRETED,
            )  # fmt: skip
        if BIAS is not None:
            z += tl.load(BIAS + columns, mask=columns < V, other=0.0)[None, :]
        if PAIRED:
            d = _moves(
                d, z, 0, row, start, X1, DW, INNER, U, DB, D_T, x1_stride, x1_rows, dw_stride, N, D, V, Q, rank,
                cap, SOFTCAP, HALVES, DESCRIPTORS, INTERPRETED, ROWS, COLUMNS, DEPTH, RANK,
            )  # fmt: skip
        y = softcap(cap, z) if SOFTCAP else z
        if SMOOTHING:
            gaps += tl.sum(tl.where(aside, 0.0, y - z_t[:, None]), 1)
        if AFTER:
            rescale, e = rest, tl.where(aside, float("-inf"), y - z_t[:, None])
        else:
            y = tl.where(aside, float("-inf"), y)
            top = tl.maximum(m, tl.max(y, 1))
            rescale, e, m = tl.exp(m - top), tl.exp(y - top[:, None]), top
            rest = rest * rescale + tl.sum(e, 1)
            e = tl.where(aside, ASIDE, e)
        if PAIRED:
            a1, b1, c1, moves1 = _sums(d, e, AFTER, SMOOTHING)
            a, b, c, moves = _join(a, b, c, moves, a1, b1, c1, moves1, rescale, AFTER)
        else:
            for q in range(0, Q):
                d = tl.zeros((ROWS, COLUMNS), tl.float32)
                if DX is not None:
                    d = add_product(
                        d, DX, dx_stride, q * N + row, (q + 1) * N, W, w_stride, start, V, CENTRE, D,
                        ROWS, COLUMNS, DEPTH, DESCRIPTORS, INTERPRETED,
                    )  # fmt: skip
                d = _moves(
                    d, z, q, row, start, X1, DW, INNER, U, DB, D_T, x1_stride, x1_rows, dw_stride, N, D, V, Q,
                    rank, cap, SOFTCAP, HALVES, DESCRIPTORS, INTERPRETED, ROWS, COLUMNS, DEPTH, RANK,
                )  # fmt: skip
                # Only now, that they hold no registers while the tile's are added up.
                a1, b1, c1, moves1 = _sums(d, e, AFTER, SMOOTHING)
                if j > first:
                    a0, b0, c0, moves0 = _load(CHANGES, part, q, rows, inside, parts, N, Q, AFTER, SMOOTHING)
                    a1, b1, c1, moves1 = _join(a0, b0, c0, moves0, a1, b1, c1, moves1, rescale, AFTER)
                _store(CHANGES, a1, b1, c1, moves1, part, q, rows, inside, parts, N, Q, AFTER, SMOOTHING)
            tl.debug_barrier()  # what is stored here other threads of the row may load beside the next tile
    if PAIRED:
        _store(CHANGES, a, b, c, moves, part, 0, rows, inside, parts, N, Q, AFTER, SMOOTHING)
    if not AFTER:
        at = tl.cast(part, tl.int64) * N + rows
        slot = tl.cast(parts, tl.int64) * N
        tl.store(VALUES + at, m, mask=inside)
        tl.store(VALUES + slot + at, rest, mask=inside)
        tl.store(VALUES + 2 * slot + at, gaps, mask=inside)


@triton.jit
def _place(blocks, parts, group):
    """Block of rows and part of the vocabulary of this program: those of a group of blocks follow each other."""
    program = tl.program_id(0)
    first = program // (group * parts) * group
    size = tl.minimum(group, blocks - first)
    within = program - first * parts
    return first + within % size, within // size


@triton.jit
def _moves(
    d, z, q, row, start, X1, DW, INNER, U, DB, D_T, x1_stride, x1_rows, dw_stride, N, D, V, Q, rank, cap,
    SOFTCAP: tl.constexpr, HALVES: tl.constexpr, DESCRIPTORS: tl.constexpr, INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """d_v − d_t of a tile from dx Wᵀ in `d` and the raw logits in `z`."""
    rows, columns = row + tl.arange(0, ROWS), start + tl.arange(0, COLUMNS)
    if DW is not None:
        d = add_product(
            d, X1, x1_stride, q * x1_rows + row, q * x1_rows + N, DW, dw_stride, q * V + start, (q + 1) * V, None, D,
            ROWS, COLUMNS, DEPTH, DESCRIPTORS, INTERPRETED,
        )  # fmt: skip
    if U is not None:
        for half in tl.static_range(HALVES):
            first = (half * Q + q) * N
            d = add_product(
                d, INNER, rank, first + row, first + N, U, rank, q * V + start, (q + 1) * V, None, rank,
                ROWS, COLUMNS, RANK, False, INTERPRETED,
            )  # fmt: skip
    wide_q = tl.cast(q, tl.int64)
    if DB is not None:
        d += tl.load(DB + wide_q * V + columns, mask=columns < V, other=0.0)[None, :]
    if SOFTCAP:
        d = softcap_change(cap, z, d)
    d_t = tl.load(D_T + wide_q * N + rows, mask=rows < N, other=0.0)
    return d - d_t[:, None]


@triton.jit
def _start(AFTER: tl.constexpr, ROWS: tl.constexpr):
    zero, lowest = tl.zeros((ROWS,), tl.float32), tl.full((ROWS,), LOWEST, tl.float32)
    return lowest if AFTER else zero, zero, zero if AFTER else lowest, zero


@triton.jit
def _sums(d, e, AFTER: tl.constexpr, SMOOTHING: tl.constexpr):
    """Of a tile's t = d: Σ e·expm1(t), Σ e·e^t, the largest t and Σ t; AFTER, where e is z − z_t: the largest
    z − z_t + t and Σ e^(z − z_t + t) from there."""
    d = tl.where((e == float("-inf")) if AFTER else (e == ASIDE), 0.0, d)
    moves = tl.sum(d, 1) if SMOOTHING else tl.zeros((d.shape[0],), tl.float32)
    if AFTER:
        y = e + d
        a = tl.maximum(tl.max(y, 1), LOWEST)
        b = tl.sum(tl.exp(y - a[:, None]), 1)
        c = moves
    else:
        grown = tl.exp(d)
        a = tl.sum(e * expm1_beside(d, grown), 1)
        b = tl.sum(e * grown, 1)
        c = tl.max(d, 1)
    return a, b, c, moves


@triton.jit
def _join(a, b, c, moves, more_a, more_b, more_c, more_moves, rescale, AFTER: tl.constexpr):
    """Sums so far and those of one more tile, which has brought the logits' maximum up by `rescale`."""
    if AFTER:
        top = tl.maximum(a, more_a)
        b = b * tl.exp(a - top) + more_b * tl.exp(more_a - top)
        a = top
    else:
        a, b, c = a * rescale + more_a, b * rescale + more_b, tl.maximum(c, more_c)
    return a, b, c, moves + more_moves


@triton.jit
def _load(SUMS, part, q, rows, inside, parts, N, Q, AFTER: tl.constexpr, SMOOTHING: tl.constexpr):
    at, slot = SUMS + (tl.cast(part, tl.int64) * Q + q) * N + rows, tl.cast(parts, tl.int64) * Q * N
    a, b = tl.load(at, mask=inside, other=0.0), tl.load(at + slot, mask=inside, other=0.0)
    c, moves = tl.zeros_like(a), tl.zeros_like(a)
    if not AFTER:
        c = tl.load(at + 2 * slot, mask=inside, other=0.0)
    if SMOOTHING and not AFTER:
        moves = tl.load(at + 3 * slot, mask=inside, other=0.0)
    return a, b, c, moves


@triton.jit
def _store(SUMS, a, b, c, moves, part, q, rows, inside, parts, N, Q, AFTER: tl.constexpr, SMOOTHING: tl.constexpr):
    at, slot = SUMS + (tl.cast(part, tl.int64) * Q + q) * N + rows, tl.cast(parts, tl.int64) * Q * N
    tl.store(at, a, mask=inside)
    tl.store(at + slot, b, mask=inside)
    if not AFTER:
        tl.store(at + 2 * slot, c, mask=inside)
    if SMOOTHING and not AFTER:
        tl.store(at + 3 * slot, moves, mask=inside)


@triton.jit
def _any(FAR, rows, inside, N, Q):
    """Whether a row of the block has a change whose sums must be taken again."""
    found = tl.zeros(rows.shape, tl.int32)
    for q in range(0, Q):
        found |= tl.load(FAR + tl.cast(q, tl.int64) * N + rows, mask=inside, other=0).to(tl.int32)
    return tl.max(found, 0) > 0
