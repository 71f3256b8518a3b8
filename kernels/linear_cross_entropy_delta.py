"""Cross entropy behind a linear layer and its exact changes, on a GPU: logits live in registers, a tile at a time.

A program holds a block of rows and walks one part of the vocabulary, tile by tile. With one query the tile's values and
changes are formed in one loop, from one load of W (two accumulators). With more, the tile's values are formed once and
turned into e^(z−m), which stays in registers while query after query forms its changes beside it: 1 + Q products in
all, the values' never twice, at the price of reading W's tile again from the second-level cache for each.

Four to seven launches: the inner side of a low-rank change; the targets' logits and changes (`head_targets`); sums by
row and part of the vocabulary; losses out of them (`head_finish`); and, in case a change was too large for those sums,
the same walk and finish once more, which end at once for the blocks where none was. Nothing waits for the device,
nothing is added up in an order that could vary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from finf_fast.kernels.configurations import (
    INTERPRETER,
    MULTIPROCESSORS,
    OPTIONS,
    Specimen,
    architecture,
    has_descriptors,
    interpreted,
    multiprocessors,
    settings_for,
)
from finf_fast.kernels.head_finish import finish_far_kernel, finish_kernel
from finf_fast.kernels.head_targets import inner_kernel, target_kernel
from finf_fast.kernels.numerics import expm1_beside, softcap, softcap_change
from finf_fast.kernels.tiles import add_product, paired_product

LOWEST = tl.constexpr(-3.4e38)  # below every logit, and no infinity: a difference from it is no NaN
# Rows of W whose median stands for what all have in common: within an eighth of their spread, and that is enough.
SAMPLED = 129
# Rows that a program of the finish takes, numbers that one of the targets' adds up at once: one for each thread and more.
FINISH_ROWS, TARGET_BLOCK = 128, 512


@dataclass(frozen=True)
class Tiles:
    """Rows and columns of a tile of logits, its depth at a time, and how a program of them is launched."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Settings:
    pair: Tiles  # values and the changes of one query in one loop
    queries: Tiles  # values, then query after query
    capped: Tiles  # as `queries`, where a soft cap keeps the raw logits in registers too
    wide: Tiles  # float32, by multiply-adds
    rank: int  # of a low-rank change, at a time


# Two accumulators of 128×128 are 128 of a thread's 255 registers with 8 warps; a third of that size would not fit.
# Stages: as many as the shared memory holds, a stage of `pair` being (2·rows + columns)·depth bfloat16.
_FMA = Tiles(32, 64, 16, 4, 2)  # operands come from shared memory number by number: small, so that registers suffice
TABLE = {
    # The least tiles that dot allows: small tests have several.
    INTERPRETER: Settings(*[Tiles(16, 64, 32, 1, 1)] * 4, rank=16),
    # mma.sync keeps operands in registers as well: 64 columns. 163 KiB: 3 stages of 40 KiB.
    80: Settings(Tiles(128, 64, 64, 8, 3), Tiles(128, 64, 64, 8, 3), Tiles(128, 64, 32, 8, 3), _FMA, rank=16),
    # As 80 with 99 KiB.
    89: Settings(Tiles(128, 64, 32, 8, 3), Tiles(128, 64, 64, 8, 3), Tiles(128, 64, 32, 8, 3), _FMA, rank=16),
    # wgmma reads both operands from shared memory. 227 KiB: 4 stages of 48 KiB, 5 of 32.
    90: Settings(Tiles(128, 128, 64, 8, 4), Tiles(128, 128, 64, 8, 5), Tiles(128, 64, 64, 8, 4), _FMA, rank=16),
    # Accumulators lie in tensor memory; loads as on 90.
    100: Settings(Tiles(128, 128, 64, 8, 4), Tiles(128, 128, 64, 8, 5), Tiles(128, 64, 64, 8, 4), _FMA, rank=16),
}


@triton.jit
def sums_kernel(
    X, DX, W, CENTRE, X1, DW, INNER, U, BIAS, DB, TARGET, Z_T, D_T, FAR, VALUES, CHANGES,
    x_stride, dx_stride, w_stride, x1_stride, x1_rows, dw_stride, N, D, V, Q, rank, tiles_a_part, cap,
    AFTER: tl.constexpr, PAIRED: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, HALVES: tl.constexpr,
    DESCRIPTORS: tl.constexpr, INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """VALUES and CHANGES of a block of rows and a part of the vocabulary; AFTER: AFTERS of a block with FAR rows."""
    row, part, parts = tl.program_id(0) * ROWS, tl.program_id(1), tl.num_programs(1)
    rows = row + tl.arange(0, ROWS)
    inside = rows < N
    if AFTER:
        if not _any(FAR, rows, inside, N, Q):
            return
    t = tl.load(TARGET + rows, mask=inside, other=-1)
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
                d, z, aside, 0, row, start, X1, DW, INNER, U, DB, D_T, x1_stride, x1_rows, dw_stride, N, D, V, Q, rank,
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
        if PAIRED:
            a, b, c, moves = _fold(d, e, rescale, a, b, c, moves, AFTER, SMOOTHING)
        else:
            for q in range(0, Q):
                d = tl.zeros((ROWS, COLUMNS), tl.float32)
                if DX is not None:
                    d = add_product(
                        d, DX, dx_stride, q * N + row, (q + 1) * N, W, w_stride, start, V, CENTRE, D,
                        ROWS, COLUMNS, DEPTH, DESCRIPTORS, INTERPRETED,
                    )  # fmt: skip
                d = _moves(
                    d, z, aside, q, row, start, X1, DW, INNER, U, DB, D_T, x1_stride, x1_rows, dw_stride, N, D, V, Q,
                    rank, cap, SOFTCAP, HALVES, DESCRIPTORS, INTERPRETED, ROWS, COLUMNS, DEPTH, RANK,
                )  # fmt: skip
                a, b, c, moves = _start(AFTER, ROWS)
                if j > first:
                    a, b, c, moves = _load(CHANGES, part, q, rows, inside, parts, N, Q, AFTER, SMOOTHING)
                a, b, c, moves = _fold(d, e, rescale, a, b, c, moves, AFTER, SMOOTHING)
                _store(CHANGES, a, b, c, moves, part, q, rows, inside, parts, N, Q, AFTER, SMOOTHING)
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
def _moves(
    d, z, aside, q, row, start, X1, DW, INNER, U, DB, D_T, x1_stride, x1_rows, dw_stride, N, D, V, Q, rank, cap,
    SOFTCAP: tl.constexpr, HALVES: tl.constexpr, DESCRIPTORS: tl.constexpr, INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """d_v − d_t of a tile from dx Wᵀ in `d` and the raw logits in `z`; 0 where `aside`."""
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
    return tl.where(aside, 0.0, d - d_t[:, None])


@triton.jit
def _start(AFTER: tl.constexpr, ROWS: tl.constexpr):
    zero, lowest = tl.zeros((ROWS,), tl.float32), tl.full((ROWS,), LOWEST, tl.float32)
    return lowest if AFTER else zero, zero, zero if AFTER else lowest, zero


@triton.jit
def _fold(d, e, rescale, a, b, c, moves, AFTER: tl.constexpr, SMOOTHING: tl.constexpr):
    """A tile's t = d into a query's sums: Σ e·expm1(t), Σ e·e^t, the largest t; AFTER, where e is z − z_t, into the
    largest z − z_t + t and Σ e^(z − z_t + t) from there."""
    if AFTER:
        y = e + d
        top = tl.maximum(a, tl.max(y, 1))
        b = b * tl.exp(a - top) + tl.sum(tl.exp(y - top[:, None]), 1)
        a = top
    else:
        grown = tl.exp(d)
        a = a * rescale + tl.sum(e * expm1_beside(d, grown), 1)
        b = b * rescale + tl.sum(e * grown, 1)
        c = tl.maximum(c, tl.max(d, 1))
        if SMOOTHING:
            moves += tl.sum(d, 1)
    return a, b, c, moves


@triton.jit
def _load(SUMS, part, q, rows, inside, parts, N, Q, AFTER: tl.constexpr, SMOOTHING: tl.constexpr):
    at, slot = SUMS + (tl.cast(part, tl.int64) * Q + q) * N + rows, tl.cast(parts, tl.int64) * Q * N
    a, b = tl.load(at, mask=inside, other=0.0), tl.load(at + slot, mask=inside, other=0.0)
    c, moves = a * 0.0, a * 0.0
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


def linear_cross_entropy_delta(
    x: Tensor,
    dx: Tensor | None,
    W: Tensor,
    target: Tensor,
    base: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    db: Tensor | None,
    dW: Tensor | None,
    U: Tensor | None,
    V: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    label_smoothing: float,
) -> None:
    """Launches it all; see `finf_fast.ops.linear_cross_entropy_delta_out`.

    Shapes as there; x, dx, W float32 or bfloat16, the changes in any dtype. `bias` float32, freed of its largest.
    """
    if not len(x):
        return
    head = _Head.of(x, dx, W, target, bias, db, dW, U, V, softcap)
    z_t, d_t = _look_up_targets(head, ignore_index)
    parts, tiles_a_part = head.parts()
    Q, N = delta.shape
    values = x.new_empty((3, parts, N), dtype=torch.float32)
    changes = x.new_empty((4, parts, Q, N), dtype=torch.float32)
    far = x.new_empty((Q, N), dtype=torch.int8)
    smoothing = label_smoothing > 0
    _walk(head, z_t, d_t, far, values, changes, parts, tiles_a_part, after=False, smoothing=smoothing)
    sizes, options = (N, len(W), Q, parts), {"SMOOTHING": smoothing, "BLOCK": FINISH_ROWS, **OPTIONS}
    blocks = triton.cdiv(N, FINISH_ROWS)
    finish_kernel[(blocks,)](
        *(head.target, z_t, values, changes, base, delta, far, delta.stride(0)), *sizes, ignore_index, label_smoothing,
        **options,
    )  # fmt: skip
    if Q:
        afters = x.new_empty((2, parts, Q, N), dtype=torch.float32)
        _walk(head, z_t, d_t, far, values, afters, parts, tiles_a_part, after=True, smoothing=False)
        finish_far_kernel[(blocks, Q)](
            *(z_t, values, changes, afters, delta, far, delta.stride(0)), *sizes, label_smoothing, **options
        )


@dataclass(frozen=True)
class _Head:
    """The layer and its rows as the kernels read them: rows without gaps, queries one after another."""

    x: Tensor  # (N, D)
    dx: Tensor | None  # (Q·N, D)
    W: Tensor  # (V, D)
    centre: Tensor | None  # (D), to be taken from every row of W
    x1: Tensor | None  # (Q·N, D) or, where x does not change, (N, D)
    dW: Tensor | None  # (Q·V, D)
    inner: Tensor | None  # (halves, Q, N, r)
    U: Tensor | None  # (Q, V, r)
    bias: Tensor | None  # (V) float32
    db: Tensor | None  # (Q, V) float32
    target: Tensor
    softcap: float | None
    Q: int

    @staticmethod
    def of(x, dx, W, target, bias, db, dW, U, V, softcap) -> _Head:
        """Copies only what the kernels cannot read as it lies: gaps inside rows, updates in another type.

        x + dx beside a dense change is rounded to the type of the products, once, as every face does.
        """
        Q = next((len(y) for y in (dx, db, dW, U) if y is not None), 0)
        x1 = None if dW is None else x if dx is None else _flat(x + dx)
        # Shorter products are exact and take their offset as it comes; a soft cap feels it.
        centred = x.dtype == torch.float32 and not softcap
        centre = W[:: -(-len(W) // SAMPLED)].median(0).values.contiguous() if centred else None
        dx, dW, U = _flat(dx), _flat(_as(dW, x.dtype)), None if U is None else _as(U, x.dtype).contiguous()
        x, W, x1 = (y if y is None else _flat(y) for y in (x, W, x1))
        bias, db = (None if y is None else y.float().contiguous() for y in (bias, db))
        inner = None if V is None else _inner(x, dx, V.float().contiguous())
        return _Head(x, dx, W, centre, x1, dW, inner, U, bias, db, target.contiguous(), softcap, Q)

    @property
    def architecture(self) -> int:
        return architecture(self.x.device)

    @property
    def paired(self) -> bool:
        return self.Q == 1 and self.dx is not None

    @property
    def tiles(self) -> Tiles:
        settings = settings_for(TABLE, self.architecture)
        if self.x.dtype == torch.float32:
            return settings.wide
        return settings.pair if self.paired else settings.capped if self.softcap else settings.queries

    @property
    def halves(self) -> int:
        return 1 if self.inner is None else len(self.inner)

    def parts(self) -> tuple[int, int]:
        """Parts of the vocabulary and tiles in each: what keeps the multiprocessors busy for the fewest tiles."""
        blocks, tiles = triton.cdiv(len(self.x), self.tiles.rows), triton.cdiv(len(self.W), self.tiles.columns)
        return _fewest_steps(blocks, tiles, multiprocessors(self.x.device))

    def descriptors(self) -> bool:
        """Whether the long matrices can be read through tensor descriptors: multiples of 16 bytes everywhere."""
        long = [y for y in (self.x, self.dx, self.W, self.x1, self.dW) if y is not None]
        fits = all(y.numel() and y.data_ptr() % 16 == 0 and y.stride(0) * y.itemsize % 16 == 0 for y in long)
        return self.x.dtype == torch.bfloat16 and has_descriptors(self.architecture) and fits


def _as(y: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if y is None else y.to(dtype)


def _flat(y: Tensor | None) -> Tensor | None:
    """(…, D) as a matrix of rows without gaps, all at one distance; itself where it lies so."""
    if y is None:
        return None
    y = y.reshape(-1, y.shape[-1])
    return y if y.shape[1] <= 1 or y.stride(1) == 1 else y.contiguous()


def _fewest_steps(blocks: int, tiles: int, processors: int) -> tuple[int, int]:
    """(parts, tiles a part) for which `processors` programs at a time are done after the fewest tiles."""
    most = min(tiles, max(1, 4 * processors // blocks))  # past four rounds nothing is gained, and partials grow
    sizes = {triton.cdiv(tiles, parts) for parts in range(1, most + 1)}

    def steps(size: int) -> tuple[int, int]:
        return triton.cdiv(blocks * triton.cdiv(tiles, size), processors) * size, -size

    size = min(sizes, key=steps)
    return triton.cdiv(tiles, size), size


def _inner(x: Tensor, dx: Tensor | None, R: Tensor) -> Tensor:
    """(halves, Q, N, r) = (x + dx_q) R_q: for bfloat16 products in two parts, which together hold 16 bits of it."""
    (Q, D, r), N = R.shape, len(x)
    inner = x.new_empty((1 if x.dtype == torch.float32 else 2, Q, N, r))
    rows, depth, rank = 32, 32, 16  # float32 by multiply-adds; a hundredth of all work
    if inner.numel():
        inner_kernel[(triton.cdiv(N, rows), Q, triton.cdiv(r, rank))](
            *(x, dx, R, inner, x.stride(0), 0 if dx is None else dx.stride(0), N, D, Q, r),
            **{"HALVES": len(inner), "ROWS": rows, "DEPTH": depth, "RANK": rank, **OPTIONS},
        )
    return inner


def _strides(head: _Head) -> tuple[int, ...]:
    """Distances between rows, and how many rows of x1 lie between two queries'."""
    x, dx, W, x1, dW = (0 if y is None else y.stride(0) for y in (head.x, head.dx, head.W, head.x1, head.dW))
    moved = 0 if head.x1 is None or len(head.x1) == len(head.x) and head.dx is None else len(head.x)
    return x, dx, W, x1, moved, dW


def _look_up_targets(head: _Head, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Each target's logit (N) in float64, and its changes (Q, N)."""
    N, D = head.x.shape
    z_t = head.x.new_empty(N, dtype=torch.float64)
    d_t = head.x.new_empty((head.Q, N), dtype=torch.float32)
    rank = 0 if head.U is None else head.U.shape[2]
    target_kernel[(N,)](
        *(head.x, head.dx, head.W, head.centre, head.x1, head.dW, head.inner, head.U, head.bias, head.db),
        *(head.target, z_t, d_t, *_strides(head), N, D, len(head.W), head.Q, rank, head.softcap or 1.0, ignore_index),
        **{"SOFTCAP": bool(head.softcap), "HALVES": head.halves, "BLOCK": TARGET_BLOCK, **OPTIONS},
    )
    return z_t, d_t


def _walk(head: _Head, z_t, d_t, far, values, changes, parts, tiles_a_part, *, after: bool, smoothing: bool) -> None:
    tiles, descriptors, rank = head.tiles, head.descriptors(), settings_for(TABLE, head.architecture).rank

    def long(y: Tensor | None, rows: int):
        return y if y is None or not descriptors else _descriptor(y, [rows, tiles.depth])

    (N, D), r = head.x.shape, 0 if head.U is None else head.U.shape[2]
    x, dx, x1 = (long(y, tiles.rows) for y in (head.x, head.dx, head.x1))
    W, dW = (long(y, tiles.columns) for y in (head.W, head.dW))
    sums_kernel[(triton.cdiv(N, tiles.rows), parts)](
        *(x, dx, W, head.centre, x1, dW, head.inner, head.U, head.bias, head.db, head.target, z_t, d_t, far),
        *(values, changes, *_strides(head), N, D, len(head.W), head.Q, r, tiles_a_part, head.softcap or 1.0),
        **_constants(tiles, rank, after, head.paired, bool(head.softcap), smoothing, head.halves, descriptors),
        **{"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, **OPTIONS},
    )


def _descriptor(y: Tensor, block: list[int]):
    from triton.tools.tensor_descriptor import TensorDescriptor  # not in the oldest Triton; no GPU that old asks for it

    return TensorDescriptor.from_tensor(y, block)


def _constants(tiles: Tiles, rank, after, paired, softcap, smoothing, halves, descriptors) -> dict:
    flags = {"AFTER": after, "PAIRED": paired, "SOFTCAP": softcap, "SMOOTHING": smoothing, "HALVES": halves}
    sizes = {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "DEPTH": tiles.depth, "RANK": rank}
    return {**flags, **sizes, "DESCRIPTORS": descriptors, "INTERPRETED": interpreted()}
