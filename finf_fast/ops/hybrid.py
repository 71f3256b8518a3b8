"""The face `hybrid` of linear_cross_entropy_delta: torch's own products into a chunk of logits, then the row kernel.

What anyone would write who has a good matrix product and `cross_entropy_delta`: the competitor of the fused kernel on a
GPU, and what runs where the fused one does not. A chunk is the logits of some rows and all their changes, float32,
(1+Q, n, V): written once by one product of the whole stack, read once by the row kernel.

Memory beside inputs and results is bounded: the chunk, CHUNK_BYTES or what a single row needs where that is more; of a
changed weight one query's share of it once more; and PANEL_BYTES for what has to be copied, a dozen of them under a
soft cap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from finf_fast.kernels.centre import centre
from finf_fast.reference.changes import tanh_change

__all__ = ["linear_cross_entropy_delta"]

# 2000 rows of a stack even at V = 128256: a product of so many rows reads W often enough to be bound by multiplying.
CHUNK_BYTES = 1 << 30
# Copies of a part of the weight, of an update in another type, and what a soft cap makes on its way.
PANEL_BYTES = 64 << 20
# Columns below which a product is no longer at full speed; widths that are a multiple of 64 fill its tiles.
NARROWEST, MULTIPLE = 512, 64


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
    score_rows: Callable,
) -> None:
    """Writes base and delta; see `finf_fast.ops.linear_cross_entropy_delta_out`.

    Shapes as there; x, dx, W float32 or bfloat16, the changes in any dtype. `bias` float32, freed of its largest.
    `score_rows` is a face of `cross_entropy_delta`. Products of float32 are as exact as
    ``torch.get_float32_matmul_precision()`` says: float32 itself, unless the user asked for less.
    """
    N, size = len(x), len(W)
    db = None if db is None else db.float()
    head = _Head(x, dx, W, _centre(W, softcap), bias, db, dW, U, V, softcap, len(delta))
    height, width = _chunk_rows(head), _panel_columns(head)
    room = x.new_empty(head.planes * min(N, height) * size, dtype=torch.float32)
    for rows in _slices(N, height):
        chunk = _Rows.of(head, rows)
        planes = room[: head.planes * chunk.count * size].view(head.planes, chunk.count, size)
        for columns in _slices(size, width):
            _form(head, chunk, columns, planes[..., columns])
        z, d = planes[0], planes[1 : 1 + head.Q]
        score_rows(z, d, target[rows], base[rows], delta[:, rows], ignore_index, label_smoothing)


@dataclass(frozen=True)
class _Head:
    x: Tensor  # (N, D)
    dx: Tensor | None  # (Q, N, D)
    W: Tensor  # (V, D)
    centre: Tensor | None  # (D), to be taken from every row of W
    bias: Tensor | None  # (V) float32
    db: Tensor | None  # (Q, V) float32
    dW: Tensor | None  # (Q, V, D), as given
    U: Tensor | None  # (Q, V, r), as given
    V: Tensor | None  # (Q, D, r), as given
    softcap: float | None
    Q: int

    @property
    def change(self) -> Tensor | None:
        """(Q, V, K) what a changed weight is multiplied by, from the outer side."""
        return self.U if self.dW is None else self.dW

    @property
    def planes(self) -> int:
        """Of the room: logits, their changes, and one query's product before it is added to what is there."""
        return 1 + self.Q + (self.change is not None and self.dx is not None)


@dataclass(frozen=True)
class _Rows:
    """Some rows as the products take them."""

    count: int
    stack: Tensor  # ((1+Q)·n, D) values and changes, or (n, D) where x does not change
    inner: Tensor | None  # (Q, n, K) what the changed weight is multiplied by, from the inner side; or (1, n, K)

    @staticmethod
    def of(head: _Head, rows: slice) -> _Rows:
        x = head.x[rows]
        dx = None if head.dx is None else head.dx[:, rows]
        stack = x if dx is None else torch.cat([x[None], dx]).flatten(0, 1)
        inner = None
        if head.dW is not None:
            inner = x[None] if dx is None else x + dx
        elif head.V is not None:
            x1 = x[None].float() if dx is None else x.float() + dx.float()
            inner = (x1 @ head.V.float()).to(x.dtype)
        return _Rows(len(x), stack, inner)


def _form(head: _Head, rows: _Rows, columns: slice, y: Tensor) -> None:
    """y (planes, n, P) = logits and changes of these rows and columns."""
    W = head.W[columns] if head.centre is None else head.W[columns] - head.centre
    formed = len(rows.stack) // rows.count
    _product(rows.stack, W, y[:formed].view(-1, len(W)))
    y[formed : 1 + head.Q].zero_()
    if head.change is not None:
        for q in range(head.Q):
            inner, outer = rows.inner[q % len(rows.inner)], head.change[q, columns].to(W.dtype)
            _product(inner, outer, y[1 + q] if head.dx is None else y[-1])
            if head.dx is not None:
                y[1 + q] += y[-1]
    if head.bias is not None:
        y[0] += head.bias[columns]
    if head.db is not None:
        y[1 : 1 + head.Q] += head.db[:, None, columns]
    if head.softcap:
        _cap(y[: 1 + head.Q], head.softcap)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a bᵀ, in float32 whatever the type of the factors."""
    if a.dtype == torch.float32:
        torch.mm(a, b.mT, out=out)
    elif a.device.type == "cuda":
        torch.mm(a, b.mT, out_dtype=torch.float32, out=out)
    else:  # products of short numbers are exact in float32; a processor has no such mm
        torch.mm(a.float(), b.float().mT, out=out)


def _cap(y: Tensor, softcap: float) -> None:
    """c tanh(z / c) in place, and its change, of y (1+Q, n, P)."""
    y /= softcap
    for d in y[1:]:
        d.copy_(tanh_change(y[0], d))
    y[0].tanh_()
    y *= softcap


def _centre(W: Tensor, softcap: float | None) -> Tensor | None:
    """(D) what rows of W have in common. Shorter products are exact and take their offset as it comes; a soft cap
    feels it."""
    return centre(W) if W.dtype == torch.float32 and not softcap else None


def _chunk_rows(head: _Head) -> int:
    return max(1, CHUNK_BYTES // (4 * head.planes * len(head.W)))


def _panel_columns(head: _Head) -> int:
    """Columns formed at a time: all, unless something has to be copied for them."""
    V, D = head.W.shape
    copied = 0 if head.centre is None else D * head.W.itemsize
    if head.change is not None and head.change.dtype != head.W.dtype:
        copied += head.change.shape[2] * head.W.itemsize
    copied += 4 * _chunk_rows(head) if head.softcap else 0
    return V if not copied else max(NARROWEST, PANEL_BYTES // copied // MULTIPLE * MULTIPLE)


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))
