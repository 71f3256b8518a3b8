"""A linear layer on stacks (value, changes), where input, weight and bias may all have changed.

One product: a program takes a block of rows of one query and a block of columns, multiplies with the shared weight,
and adds what the changed weight brings before anything is rounded or stored:

    y[0] = x0 Wᵀ + bias        y[1+q] = d_q Wᵀ + (x0 + d_q) dW_qᵀ + db_q

with dW_q dense, or U_q V_qᵀ: then a skinny product before it leaves (x0 + d_q) V_q, rounded to the stack's type, and
the other half is r more columns of depth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from finf_fast.kernels.configurations import INTERPRETER, OPTIONS, Specimen, architecture, roomy, settings_for
from finf_fast.kernels.layouts import MULTIPLE, aligned
from finf_fast.kernels.numerics import product, rounded


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth that a program holds at a time, and its warps and stages of loads."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tiles:
    short: Tile  # bfloat16
    ragged: Tile  # the same where rows of the result are no multiples of 16 numbers, and are stored one by one
    long: Tile  # float32, by multiply-adds: tensor cores would shorten its numbers

    def of(self, dtype: torch.dtype, E: int) -> Tile:
        if dtype == torch.float32:
            return self.long
        return self.ragged if E % MULTIPLE else self.short


# bfloat16: 128 x 256 accumulators take half of a multiprocessor's registers, and three stages of 48 KiB its memory;
# where there is less of it, 128 x 128. Rows of blocks taken together share their columns in the second-level cache.
# Where results are stored one by one each needs an address of its own, for which a quarter as many leave room.
# float32: as many warps as leave nothing for the stack.
_PLAIN = Tile(64, 64, 16, 4, 2)
_RAGGED = Tile(128, 64, 64, 8, 3)
TILES = {
    INTERPRETER: Tiles(*[Tile(32, 32, 16, 1, 1)] * 3),
    80: Tiles(Tile(128, 128, 32, 8, 4), replace(_RAGGED, BLOCK_K=32), replace(_PLAIN, num_warps=8)),
    89: Tiles(Tile(128, 128, 32, 8, 3), replace(_RAGGED, BLOCK_K=32), replace(_PLAIN, num_warps=8)),
    90: Tiles(Tile(128, 256, 64, 8, 3), _RAGGED, _PLAIN),
    100: Tiles(Tile(128, 256, 64, 8, 3), _RAGGED, _PLAIN),
}
TOGETHER = tl.constexpr(8)


@triton.jit
def _tile(A, row_stride, stride, rows, columns, row_end, end):
    """Numbers (rows, columns) of a matrix, zeros from its ends on."""
    inside = (rows < row_end)[:, None] & (columns < end)[None, :]
    at = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * stride
    return tl.load(A + at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["N"])
def _inner_kernel(
    X, FACTOR, INNER, x_q, x_n, x_d, f_q, f_d, f_r, N, D, R,
    X_MOVES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(x0 + d_q) V_q, as two products: the changed input is never rounded."""
    TYPE: tl.constexpr = X.dtype.element_ty
    q = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    columns = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    FACTOR += q * f_q
    for k in range(0, D, BLOCK_K):
        depth = k + tl.arange(0, BLOCK_K)
        v = _tile(FACTOR, f_d, f_r, depth, columns, D, R)
        total = product(_tile(X, x_n, x_d, rows, depth, N, D), v, total)
        if X_MOVES:
            total = product(_tile(X + (1 + q) * x_q, x_n, x_d, rows, depth, N, D), v, total)
    at = (q * N + rows)[:, None] * R + columns[None, :]
    tl.store(INNER + at, rounded(total, TYPE), mask=(rows < N)[:, None] & (columns < R)[None, :])


@triton.jit
def _block(pid, row_blocks, column_blocks):
    """Which block a program takes: columns one after another for some rows of blocks together."""
    size = TOGETHER * column_blocks
    first = pid // size * TOGETHER
    together = min(row_blocks - first, TOGETHER)
    return first + pid % size % together, pid % size // together


# Counts that no load or store hangs on: else each is compiled for anew where it is 1 and where it is a multiple of 16.
@triton.jit(do_not_specialize=["N", "CHANGES", "db_q"])
def _linear_delta_kernel(
    X, W, BIAS, DW, INNER, FACTOR, DB, Y,
    x_q, x_n, x_d, w_e, w_d, dw_q, dw_e, dw_d, f_q, f_e, f_r, db_q, db_e, N, D, E, R, CHANGES,
    X_MOVES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = X.dtype.element_ty
    blocks = tl.cdiv(N, BLOCK_M)
    row_block, column_block = _block(tl.program_id(0), (1 + CHANGES) * blocks, tl.cdiv(E, BLOCK_N))
    q = (row_block // blocks).to(tl.int64)
    rows = row_block % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    moved = q > 0
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    shared = D if X_MOVES else tl.where(moved, 0, D)
    for k in range(0, shared, BLOCK_K):
        depth = k + tl.arange(0, BLOCK_K)
        x = _tile(X + q * x_q, x_n, x_d, rows, depth, N, D)
        total = product(x, tl.trans(_tile(W, w_e, w_d, columns, depth, E, D)), total)
    if INNER is not None:
        INNER += (q - 1) * N * R
        FACTOR += (q - 1) * f_q
        for k in range(0, tl.where(moved, R, 0), BLOCK_K):
            depth = k + tl.arange(0, BLOCK_K)
            u = _tile(FACTOR, f_e, f_r, columns, depth, E, R)
            total = product(_tile(INNER, R, 1, rows, depth, N, R), tl.trans(u), total)
    if DW is not None:
        DW += (q - 1) * dw_q
        for k in range(0, tl.where(moved, D, 0), BLOCK_K):
            depth = k + tl.arange(0, BLOCK_K)
            x1 = _tile(X, x_n, x_d, rows, depth, N, D)
            if X_MOVES:
                d = _tile(X + q * x_q, x_n, x_d, rows, depth, N, D)
                x1 = rounded(x1.to(tl.float32) + d.to(tl.float32), TYPE)
            total = product(x1, tl.trans(_tile(DW, dw_e, dw_d, columns, depth, E, D)), total)
    if BIAS is not None:
        bias = tl.load(BIAS + columns, mask=columns < E, other=0.0).to(tl.float32)
        total += tl.where(moved, 0.0, bias)[None, :]
    if DB is not None:
        db = tl.load(DB + tl.maximum(q - 1, 0) * db_q + columns * db_e, mask=columns < E, other=0.0).to(tl.float32)
        total += tl.where(moved, db, 0.0)[None, :]
    at = (q * N + rows)[:, None] * E + columns[None, :]
    tl.store(Y + at, rounded(total, TYPE), mask=(rows < N)[:, None] & (columns < E)[None, :])


def linear_delta(
    stack: Tensor,
    W: Tensor,
    bias: Tensor | None,
    dW: Tensor | None,
    factors: tuple[Tensor, Tensor] | None,
    db: Tensor | None,
    y: Tensor,
) -> None:
    """Fill `y` (1+Q, N, D'), contiguous. As `finf_fast.ops.linear_delta`; of any strides, float32 or bfloat16.

    `bias` is contiguous. What cannot be read at full speed as it lies is copied, and so are changes of the weight in
    another type, which would need more shared memory than there is; a transposed weight can be read.
    """
    E, Q, dtype = len(W), len(y) - 1, stack.dtype
    stack, W = aligned(stack), aligned(W, turned=True)
    dW = None if dW is None else aligned(dW.to(dtype), turned=True)
    if factors is not None:
        factors = aligned(factors[0].to(dtype)), aligned(factors[1].to(dtype), both=True)
    _, N, D = stack.shape
    tiles = settings_for(TILES, architecture(stack.device))
    tile = tiles.of(dtype, E)
    U, inner = (None, None) if factors is None else (factors[0], _inner(stack, factors[1], tiles))
    room = roomy(tile.num_warps) if dtype == torch.float32 else {}
    launch = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, **OPTIONS, **room}
    _linear_delta_kernel[((1 + Q) * triton.cdiv(N, tile.BLOCK_M) * triton.cdiv(E, tile.BLOCK_N),)](
        *(stack, W, bias, dW, inner, U, db, y, *stack.stride(), *W.stride()),
        *(*_strides(dW, 3), *_strides(U, 3), *_strides(db, 2), N, D, E, 0 if inner is None else inner.shape[2], Q),
        X_MOVES=len(stack) > 1,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        **launch,
    )


def _strides(x: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if x is None else x.stride()


# Columns of a change's rank taken at a time; most updates have 16 or 32.
RANK = 32


def _inner(stack: Tensor, V: Tensor, tiles: Tiles) -> Tensor:
    """(x0 + d_q) V_q: (Q, N, r)."""
    (Q, D, R), N = V.shape, stack.shape[1]
    tile = tiles.of(stack.dtype, R)  # r is a multiple of 16, also where the layer's result is ragged
    inner = stack.new_empty(Q, N, R)
    grid = (triton.cdiv(N, tile.BLOCK_M), Q, triton.cdiv(R, RANK))
    _inner_kernel[grid](
        *(stack, V, inner, *stack.stride(), *V.stride(), N, D, R),
        X_MOVES=len(stack) > 1,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=RANK,
        BLOCK_K=tile.BLOCK_K,
        num_warps=4,
        num_stages=tile.num_stages,
        **OPTIONS,
        **roomy(4),
    )
    return inner


def specimens(architecture: int) -> list[Specimen]:
    """The layer with a low-rank, a dense and no change of its weight: as it lies, transposed, and with a ragged result;
    and the skinny product."""
    found = settings_for(TILES, architecture)
    matrix = ("HGMMA",) if architecture == 90 else ("HMMA",) if architecture < 90 else ()
    # LDGSTS: loads that a product does not wait for, where there are several stages of them.
    ways = {"": found.short, "transposed": found.short, "ragged": found.ragged}
    kinds = [("bf16", way, tile, (*matrix, "LDGSTS")) for way, tile in ways.items()]
    kinds += [("fp32", way, found.long, ("LDGSTS",)) for way in ways]
    forms = {"": (), "low rank": ("INNER", "FACTOR"), "dense": ("DW",)}
    layers = [_specimen(f"{name} {kind[1]}", *kind, given) for kind in kinds for name, given in forms.items()]
    return layers + [_inner_specimen(kind, tile, seen) for kind, way, tile, seen in kinds if not way]


def _specimen(name: str, kind: str, way: str, tile: Tile, seen: tuple[str, ...], given: tuple[str, ...]) -> Specimen:
    absent = {"DW", "INNER", "FACTOR"} - set(given)
    tensors = dict.fromkeys([x for x in ("X", "W", "BIAS", "DB", "Y", *given) if x not in absent], f"*{kind}")
    ones = {"x_d", "f_r", "db_e", *(("w_e", "dw_e") if way == "transposed" else ("w_d", "dw_d"))}
    strides = [name for name in _linear_delta_kernel.arg_names if name.islower() and name not in ones]
    shape = {"BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N, "BLOCK_K": tile.BLOCK_K}
    return Specimen(
        " ".join([kind, *name.split()]),
        _linear_delta_kernel,
        tensors | dict.fromkeys([*strides, "N", "D", "E", "R", "CHANGES"], "i32"),
        {**dict.fromkeys(absent), **dict.fromkeys(ones, 1), "X_MOVES": True, **shape},
        tile.num_warps,
        tile.num_stages,
        unaligned=("E",) if way == "ragged" else (),
        instructions=seen,
        options=roomy(tile.num_warps) if kind == "fp32" else {},
    )


def _inner_specimen(kind: str, tile: Tile, seen: tuple[str, ...]) -> Specimen:
    shape = {"BLOCK_M": tile.BLOCK_M, "BLOCK_N": RANK, "BLOCK_K": tile.BLOCK_K}
    return Specimen(
        f"{kind} inner",
        _inner_kernel,
        dict.fromkeys(["X", "FACTOR", "INNER"], f"*{kind}")
        | dict.fromkeys(["x_q", "x_n", "f_q", "f_d", "N", "D", "R"], "i32"),
        {"x_d": 1, "f_r": 1, "X_MOVES": True, **shape},
        4,
        tile.num_stages,
        instructions=seen,
        options=roomy(4),
    )
