"""Cross entropy behind a linear layer and its exact changes, on a GPU: logits live in registers, a tile at a time.

With one query the values and changes of a tile are formed in one loop, from one load of W (two accumulators). With more
the values are formed once and turned into e^(z−m), which stays in registers while query after query forms its changes
beside it: 1 + Q products in all, the values' never twice, at the price of reading W's tile again, from the second-level
cache, for each.

Four to six launches: the inner side of a low-rank change; the targets' logits and changes (`head_targets`); sums by row
and part of the vocabulary (`head_sums`); losses out of them (`head_finish`); and, in case a change was too large for
those sums, the same walk and finish once more, which end at once for the blocks of rows where none was. Nothing waits
for the device, and nothing is added up in an order that could vary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from finf_fast.kernels.centre import centre
from finf_fast.kernels.configurations import (
    INTERPRETER,
    OPTIONS,
    architecture,
    has_descriptors,
    interpreted,
    multiprocessors,
    newer_assembler,
    roomy,
    second_level_cache,
    settings_for,
)
from finf_fast.kernels.head_finish import finish_far_kernel, finish_kernel
from finf_fast.kernels.head_order import Order, choose_order
from finf_fast.kernels.head_sums import sums_kernel
from finf_fast.kernels.head_targets import inner_kernel, target_kernel
from finf_fast.kernels.layouts import aligned

# Rows that a program of the finish takes: one a thread; numbers that one of the targets' adds up at once: eight.
FINISH_ROWS, TARGET_BLOCK = 128, 1024


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
    pair: Tiles  # values and the changes of one query in one loop, and nothing beside
    queries: Tiles  # values, then query after query
    narrow: Tiles  # all that keeps more in registers: biases, a changed weight, soft cap, smoothing
    fullest: Tiles  # the last two, and a bias or a changed weight besides
    wide: Tiles  # float32
    rank: int  # of a low-rank change, at a time


# Two accumulators of 128×128, or one and the e^(z−m) of as many, are 128 of a thread's 255 registers with 8 warps. What
# comes beside them in `narrow` is spilt there, as compiling ahead of time shows, and is not with half as many columns;
# all of it at once needs a quarter as many.
# Stages are as many as shared memory holds: one is (2·rows + columns)·depth bfloat16 of a pair.
# Triton 3.6 keeps twice as many numbers of a plain tile at a time as 3.9: a pair spilt in 130 places, and in none with
# half as many columns.
# float32 goes by multiply-adds, whose operands lie in registers: 32 × 32, and 8 warps to a few numbers each.
_FMA = Tiles(32, 32, 16, 8, 2)
# There 3.9's assembler gives the smaller one 128 registers, and spills; 3.6's may use all, and spills two of the other.
_FMA_80 = Tiles(32, 64 if newer_assembler() else 32, 16, 8, 2)
_PLAIN = 128 if newer_assembler() else 64
# (x + dx) R of a low-rank change: float32 too, a hundredth of all work.
INNER = Tiles(32, 16, 32, 4, 2)
TABLE = {
    # Small: the tests' axes are cut in several.
    INTERPRETER: Settings(*[Tiles(16, 64, 64, 1, 1)] * 5, rank=16),
    # mma.sync has its operands in registers as well: half as many columns as on 90. 163 KiB.
    80: Settings(*[Tiles(128, 64, 32, 8, 4)] * 2, *[Tiles(128, 32, 64, 8, 3)] * 2, _FMA_80, rank=16),
    # As 80 with 99 KiB.
    89: Settings(Tiles(128, 64, 32, 8, 3), Tiles(128, 64, 32, 8, 4), *[Tiles(128, 32, 32, 8, 3)] * 2, _FMA_80, rank=16),
    # wgmma reads both operands from shared memory. 227 KiB: 4 stages of 48 KiB, 5 of 32.
    90: Settings(
        pair=Tiles(128, _PLAIN, 64, 8, 4),
        queries=Tiles(128, _PLAIN, 64, 8, 5),
        narrow=Tiles(128, 64, 64, 8, 4),
        fullest=Tiles(128, 32, 64, 8, 4),
        wide=_FMA,
        rank=16,
    ),
    # Results of tcgen05 come back to registers whole, and 128 columns of them spill. Not measured on a device.
    100: Settings(*[Tiles(128, 64, 64, 8, 4)] * 3, Tiles(128, 32, 64, 8, 4), _FMA, rank=16),
}


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
    smoothing = label_smoothing > 0
    head = _Head.of(x, dx, W, target, bias, db, dW, U, V, softcap, smoothing)
    z_t, d_t = _look_up_targets(head, ignore_index)
    order = head.order()
    parts = order.parts
    Q, N = delta.shape
    values = x.new_empty((3, parts, N), dtype=torch.float32)
    changes = x.new_empty((4, parts, Q, N), dtype=torch.float32)
    far = x.new_empty((Q, N), dtype=torch.int8)
    _walk(head, z_t, d_t, far, values, changes, order, after=False, smoothing=smoothing)
    sizes, options = (N, len(W), Q, parts), {"SMOOTHING": smoothing, "BLOCK": FINISH_ROWS, **OPTIONS}
    blocks = triton.cdiv(N, FINISH_ROWS)
    finish_kernel[(blocks,)](
        *(head.target, z_t, values, changes, base, delta, far, delta.stride(0)), *sizes, ignore_index, label_smoothing,
        **options,
    )  # fmt: skip
    if Q:
        afters = x.new_empty((2, parts, Q, N), dtype=torch.float32)
        _walk(head, z_t, d_t, far, values, afters, order, after=True, smoothing=False)
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
    smoothing: bool
    Q: int

    @staticmethod
    def of(x, dx, W, target, bias, db, dW, U, V, softcap, smoothing) -> _Head:
        """Copies only what the kernels cannot read at full speed as it lies, and updates in another type; D and the
        rank then end in zeros.

        x + dx beside a dense change is rounded to the type of the products, once, as every face does.
        """
        Q = next((len(y) for y in (dx, db, dW, U) if y is not None), 0)
        x1 = None if dW is None else x if dx is None else x + dx
        # Shorter products are exact and take their offset as it comes; a soft cap feels it.
        centred = x.dtype == torch.float32 and not softcap
        dW, U = (None if y is None else y.to(x.dtype) for y in (dW, U))
        x, dx, W, x1, dW = (None if y is None else _flat(y) for y in (x, dx, W, x1, dW))
        common = centre(W) if centred else None
        bias, db = (None if y is None else y.float().contiguous() for y in (bias, db))
        inner = None if V is None else _inner(x, dx, aligned(V.float(), both=True).contiguous())
        U = None if U is None else aligned(U).contiguous()
        return _Head(x, dx, W, common, x1, dW, inner, U, bias, db, target.contiguous(), softcap, smoothing, Q)

    @property
    def architecture(self) -> int:
        return architecture(self.x.device)

    @property
    def paired(self) -> bool:
        return self.Q == 1 and self.dx is not None

    @property
    def tiles(self) -> Tiles:
        beside = any(y is not None for y in (self.bias, self.db, self.dW, self.U))
        settings, float32 = settings_for(TABLE, self.architecture), self.x.dtype == torch.float32
        return choose(settings, float32, self.paired, beside, bool(self.softcap), self.smoothing)

    @property
    def halves(self) -> int:
        return 1 if self.inner is None else len(self.inner)

    def order(self) -> Order:
        """Of the programs that walk over the vocabulary."""
        blocks, tiles = triton.cdiv(len(self.x), self.tiles.rows), triton.cdiv(len(self.W), self.tiles.columns)
        again = sum(y.nbytes for y in (self.x, self.dx, self.x1) if y is not None)
        here = multiprocessors(self.x.device), second_level_cache(self.x.device)
        return choose_order(blocks, tiles, again // max(1, blocks), *here)

    @property
    def descriptors(self) -> bool:
        """Whether the long matrices are read through tensor descriptors, of which an empty one has none."""
        long = [y for y in (self.x, self.dx, self.W, self.x1, self.dW) if y is not None]
        short = self.x.dtype == torch.bfloat16
        return short and has_descriptors(self.architecture) and all(y.numel() for y in long)


def choose(settings: Settings, float32: bool, paired: bool, beside: bool, softcap: bool, smoothing: bool) -> Tiles:
    """`beside`: a bias, its change or a changed weight."""
    if float32:
        return settings.wide
    if beside and softcap and smoothing:
        return settings.fullest
    if beside or softcap or smoothing:
        return settings.narrow
    return settings.pair if paired else settings.queries


def _flat(y: Tensor) -> Tensor:
    """(…, D) as a matrix of rows apart from each other, all at one distance; itself where it lies so."""
    y = y.reshape(math.prod(y.shape[:-1]), y.shape[-1])  # not -1: D may be 0
    return aligned(y if y.stride(0) >= y.shape[1] else y.contiguous())


def _inner(x: Tensor, dx: Tensor | None, R: Tensor) -> Tensor:
    """(halves, Q, N, r) = (x + dx_q) R_q: for bfloat16 products in two parts, which together hold 16 bits of it."""
    (Q, D, r), N = R.shape, len(x)
    inner = x.new_empty((1 if x.dtype == torch.float32 else 2, Q, N, r))
    if inner.numel():
        inner_kernel[(triton.cdiv(N, INNER.rows), Q, triton.cdiv(r, INNER.columns))](
            *(x, dx, R, inner, x.stride(0), 0 if dx is None else dx.stride(0), N, D, Q, r),
            **{"HALVES": len(inner), "ROWS": INNER.rows, "DEPTH": INNER.depth, "RANK": INNER.columns},
            **{"num_warps": INNER.num_warps, "num_stages": INNER.num_stages, **OPTIONS},
        )
    return inner


def _strides(head: _Head) -> tuple[int, ...]:
    """Distances between rows, and how many rows of x1 lie between two queries'."""
    x, dx, W, x1, dW = (0 if y is None else y.stride(0) for y in (head.x, head.dx, head.W, head.x1, head.dW))
    moved = 0 if head.x1 is None or (len(head.x1) == len(head.x) and head.dx is None) else len(head.x)
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
        **{"SOFTCAP": bool(head.softcap), "HALVES": head.halves, "BLOCK": TARGET_BLOCK},
        **target_options(),
        **OPTIONS,
    )
    return z_t, d_t


def target_options() -> dict[str, int]:
    """Before Triton 3.9 a soft cap with a dense change took 8 bytes of stack, so that one more program would fit."""
    return {} if newer_assembler() else {"maxnreg": 96}


def _walk(head: _Head, z_t, d_t, far, values, changes, order: Order, *, after: bool, smoothing: bool) -> None:
    tiles, descriptors, rank = head.tiles, head.descriptors, settings_for(TABLE, head.architecture).rank

    def long(y: Tensor | None, rows: int):
        return y if y is None or not descriptors else _descriptor(y, [rows, tiles.depth])

    (N, D), r = head.x.shape, 0 if head.U is None else head.U.shape[2]
    x, dx, x1 = (long(y, tiles.rows) for y in (head.x, head.dx, head.x1))
    W, dW = (long(y, tiles.columns) for y in (head.W, head.dW))
    sums_kernel[(triton.cdiv(N, tiles.rows) * order.parts,)](
        *(x, dx, W, head.centre, x1, dW, head.inner, head.U, head.bias, head.db, head.target, z_t, d_t, far),
        *(values, changes, *_strides(head), N, D, len(head.W), head.Q, r, order.parts, order.tiles, order.group),
        head.softcap or 1.0,
        **constants(tiles, rank, after, head.paired, bool(head.softcap), smoothing, head.halves, descriptors),
        **{"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, **OPTIONS},
        **(roomy(tiles.num_warps) if head.x.dtype == torch.float32 else {}),
    )


def _descriptor(y: Tensor, block: list[int]):
    from triton.tools.tensor_descriptor import TensorDescriptor  # not in the oldest Triton: see has_descriptors

    return TensorDescriptor.from_tensor(y, block)


def constants(tiles: Tiles, rank, after, paired, softcap, smoothing, halves, descriptors) -> dict:
    flags = {"AFTER": after, "PAIRED": paired, "SOFTCAP": softcap, "SMOOTHING": smoothing, "HALVES": halves}
    sizes = {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "DEPTH": tiles.depth, "RANK": rank}
    return {**flags, **sizes, "DESCRIPTORS": descriptors, "INTERPRETED": interpreted()}
