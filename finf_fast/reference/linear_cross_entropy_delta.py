"""Cross entropy behind a linear layer, and what changes of its input and its weight do to it; no logits are stored.

The vocabulary is walked in panels of columns. Of each panel the logits z and, by products of their own, their changes d
are formed, measured against the target's (known beforehand from its gathered row of W), folded into a few sums per row,
and forgotten. A shift of all logits is not felt, so the panel of W is first freed of what its rows have in common:
logits that stand near -100, or change together, then cost no digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from finf_fast.reference.changes import tanh_change
from finf_fast.reference.cross_entropy_delta import _columns
from finf_fast.reference.product import add_linear_, linear

__all__ = ["linear_cross_entropy_delta"]

# z and d of one panel, and the panel of W: large enough for a product at full speed, small beside all logits.
PANEL_BYTES = 64 << 20
# Rows folded at once stay in a processor's cache between the passes over them.
BLOCK_BYTES = 2 << 20
# Below this many columns a product is no longer at full speed; and widths that are a multiple of 64 fill its tiles.
NARROWEST, MULTIPLE = 512, 64
# Rows of W whose median stands for what all have in common: within an eighth of their spread, and that is enough.
SAMPLED = 129
# As in csrc/numerics.h: a column that gains more on the target may count though e^(z_v - m) is 0.
LARGEST_EXPM1 = 40.0


def linear_cross_entropy_delta(
    x: Tensor,
    dx: Tensor | None,
    W: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    db: Tensor | None = None,
    dW: Tensor | None = None,
    dW_factors: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """See `finf_fast.ops.linear_cross_entropy_delta`; z in float32 (float64), d by products in the input's dtype."""
    ignored = target == ignore_index
    t = _columns(target, ignored, len(W), ignore_index)[:, 0]
    head = _head(x, dx, W, bias, db, dW, dW_factors, softcap)
    if not _may_look(x):
        base, delta = _losses(head, t, label_smoothing)
        return base.masked_fill(ignored, 0), delta.masked_fill(ignored, 0)
    if not ignored.any():
        return _losses(head, t, label_smoothing)
    kept = (~ignored).nonzero()[:, 0]
    base, delta = head.x.new_zeros(len(x)), head.x.new_zeros(head.Q, len(x))
    base[kept], delta[:, kept] = _losses(head.select(kept), t[kept], label_smoothing)
    return base, delta


def _may_look(x: Tensor) -> bool:
    """Whether a number may steer what is done next: on another device that would wait for all work queued there."""
    return x.device.type == "cpu"


@dataclass(frozen=True)
class _Head:
    """The rows that enter the last layer, and the layer. ``narrow`` is the dtype of the products that give d."""

    x: Tensor  # (N, D), float32 or float64
    dx: Tensor | None  # (Q, N, D), narrow
    W: Tensor  # (V, D), as given
    centre: Tensor  # (D), taken from every row of W
    bias: Tensor | None  # (V), dtype of x
    db: Tensor | None  # (Q, V), dtype of x
    dW: Tensor | None  # (Q, V, D), as given
    U: Tensor | None  # (Q, V, r), as given
    inner: Tensor | None  # (Q, N, r) = (x + dx_q) V_q, dtype of x
    softcap: float | None
    narrow: torch.dtype
    Q: int

    def select(self, rows: Tensor) -> _Head:
        """The same layer behind these rows only."""
        dx, inner = (None if y is None else y[:, rows] for y in (self.dx, self.inner))
        return replace(self, x=self.x[rows], dx=dx, inner=inner)

    def changed_x(self, q: int, rows: slice) -> Tensor:
        return self.x[rows] if self.dx is None else self.x[rows] + self.dx[q, rows]

    def panel(self, columns: slice) -> Tensor:
        """(P, D) centred rows of W in the dtype of x."""
        return torch.sub(self.W[columns], self.centre)


def _head(x, dx, W, bias, db, dW, factors, softcap) -> _Head:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    narrow = torch.bfloat16 if x.dtype == torch.bfloat16 else wide  # in float16 a change below 6e-8 would vanish
    sample = W[:: -(-len(W) // SAMPLED)].to(wide)
    # A soft cap does feel a shift.
    centre = sample.new_zeros(W.shape[1]) if softcap else sample.median(0).values
    U, V = factors or (None, None)
    Q = next((len(y) for y in (dx, db, dW, U) if y is not None), 0)
    x, dx = x.to(wide), None if dx is None else dx.to(narrow)
    if bias is not None:
        bias = bias.to(wide)
        # Against the largest, not the middle: -1e9 for a masked word takes no digits from the others.
        bias = bias if softcap else bias - bias.amax().clamp(min=torch.finfo(wide).min)
    db = None if db is None else db.to(wide)
    head = _Head(x, dx, W, centre, bias, db, dW, U, None, softcap, narrow, Q)
    if U is None:
        return head
    everything = slice(None)
    inner = [head.changed_x(q, everything) @ V[q].to(wide) for q in range(Q)]
    return replace(head, inner=torch.stack(inner) if inner else x.new_empty(0, len(x), U.shape[2]))


def _losses(head: _Head, t: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """base (N,) and delta (Q, N) of rows none of which is ignored.

    Small changes need one walk over the vocabulary. Large ones need the sums after the change as well: a processor
    walks again for the rows that have one; other devices, which nobody asks, take them along at once.
    """
    at = _at_target(head, t)
    sums, after = _Sums(at, smoothing), _After(at)
    _walk(head, at, [sums.fold] if _may_look(head.x) else [after.fold, sums.fold])
    base, delta = sums.loss(), torch.log1p(sums.u / sums.s())
    large = sums.large()
    if not _may_look(head.x):
        delta = torch.where(large, after.loss() - base, delta)
    elif large.any():
        far = large.any(0).nonzero()[:, 0]
        at = at.select(far)
        after = _After(at)
        _walk(head.select(far), at, [after.fold])
        delta[:, far] = torch.where(large[:, far], after.loss() - base[far], delta[:, far])
    base, delta = sums.smoothed(base, delta, len(head.W))
    return base.to(head.x.dtype), delta.to(head.x.dtype)


@dataclass(frozen=True)
class _Target:
    """Each row's target: its column t (N,), its logit z (N,) in float64, and that logit's changes d (Q, N)."""

    t: Tensor
    z: Tensor
    d: Tensor

    def select(self, rows: Tensor) -> _Target:
        return _Target(self.t[rows], self.z[rows], self.d[:, rows])


def _at_target(head: _Head, t: Tensor) -> _Target:
    """From gathered rows of W, in float64: an error of the target's logit would be one of all the row's weights."""
    (N, D), exact = head.x.shape, {"dtype": torch.float64}
    z, d = head.x.new_empty(N, **exact), head.x.new_empty(head.Q, N, **exact)
    for rows in _slices(N, max(1, PANEL_BYTES // (8 * max(D, 1)))):  # 8 bytes a float64
        column = t[rows]
        W = head.W[column].double() - head.centre
        z[rows] = (head.x[rows] * W).sum(1)
        for q in range(head.Q):
            d[q, rows] = _move_of_target(head, q, rows, column, W)
    z = z if head.bias is None else z + head.bias[t]
    z, d = _capped(z, d, head.softcap)
    return _Target(t, z, d.to(head.x.dtype))


def _move_of_target(head: _Head, q: int, rows: slice, column: Tensor, W: Tensor) -> Tensor:
    """(n,) change of the logit of each row's target, from the gathered rows of what changed."""
    d = W.new_zeros(len(column)) if head.dx is None else (head.dx[q, rows] * W).sum(1)
    if head.inner is not None:
        d = d + (head.inner[q, rows] * head.U[q, column]).sum(1)
    if head.dW is not None:
        d = d + (head.changed_x(q, rows) * head.dW[q, column]).sum(1)
    return d if head.db is None else d + head.db[q, column]


def _capped(z: Tensor, d: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """z and d behind c tanh(z / c); z (...) and d (Q, ...)."""
    if not softcap:
        return z, d
    z = z / softcap
    return softcap * torch.tanh(z), softcap * tanh_change(z, d / softcap)


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _walk(head: _Head, at: _Target, folds: list[Callable]) -> None:
    """Shows every fold, block by block, z (n, P) and d_v - d_t (Q, n, P) of all rows and columns.

    The last fold may write over them.
    """
    (N, D), V, size = head.x.shape, len(head.W), head.x.itemsize
    P, rows_at_once = _panel_size(N, D, V, (1 + head.Q) * size, size)
    block = BLOCK_BYTES // ((1 + head.Q) * size * P) + 1 if _may_look(head.x) else rows_at_once
    for columns in _slices(V, P):
        W = head.panel(columns)
        narrow = W.to(head.narrow)
        for rows in _slices(N, rows_at_once):
            z = linear(head.x[rows], W, None if head.bias is None else head.bias[columns])
            d = _moves(head, narrow, rows, columns)
            for part in _slices(len(z), block):
                z_part, d_part = _finished(head, at, z[part], d[:, part], rows.start + part.start, columns)
                for fold in folds:
                    fold(slice(rows.start + part.start, rows.start + part.stop), columns, z_part, d_part)


def _panel_size(N: int, D: int, V: int, bytes_a_cell: int, size: int) -> tuple[int, int]:
    """Columns of a panel and rows whose logits in it are formed at once."""
    wanted = min(PANEL_BYTES // (bytes_a_cell * max(N, 1)), PANEL_BYTES // (size * max(D, 1)))
    P = min(V, max(NARROWEST, wanted // MULTIPLE * MULTIPLE))
    return P, max(1, PANEL_BYTES // (bytes_a_cell * P))


def _moves(head: _Head, W: Tensor, rows: slice, columns: slice) -> Tensor:
    """(Q, n, P) change of the logits but for the bias's, W (P, D) being the narrow panel."""
    n = len(head.x[rows])
    d = W.new_zeros(head.Q, n, len(W)) if head.dx is None else linear(head.dx[:, rows], W)
    if head.inner is not None:
        add_linear_(d, head.inner[:, rows].to(W.dtype), head.U[:, columns].to(W.dtype))
    if head.dW is not None:
        for q in range(head.Q):
            x1, dW = head.changed_x(q, rows).to(W.dtype), head.dW[q, columns].to(W.dtype)
            add_linear_(d[q : q + 1], x1[None], dW[None])
    return d


def _finished(head: _Head, at: _Target, z: Tensor, d: Tensor, start: int, columns: slice) -> tuple[Tensor, Tensor]:
    """Of the rows from `start` on, z (n, P) and the moves d_v - d_t (Q, n, P), after all that is not a product."""
    rows = slice(start, start + len(z))
    if head.db is not None:
        d = d + head.db[:, None, columns]
    z, d = _capped(z, d.to(z.dtype), head.softcap)
    d = d - at.d[:, rows, None]
    _put_target(d, at.t[rows], columns, 0)  # what two products of the same numbers differ by is no change
    return z, d


class _Sums:
    """What the loss and its small changes need, over all columns but the target's, with a running maximum m."""

    def __init__(self, at: _Target, smoothing: float):
        self.t, self.z, self.smoothing = at.t, at.z, smoothing
        self.m = torch.full_like(at.z, torch.finfo(at.d.dtype).min, dtype=at.d.dtype)
        self.rest, self.sum_a = torch.zeros_like(at.z), torch.zeros_like(at.z)  # sums of e^(z - m), of z - z_t
        self.u, self.sum_d = (torch.zeros_like(at.d, dtype=at.z.dtype) for _ in range(2))  # of e^(z - m) expm1(d), of d
        self.peak = torch.full_like(at.d, -torch.inf)  # largest d

    def fold(self, rows: slice, columns: slice, z: Tensor, d: Tensor) -> None:
        """Takes in a block; `z` and `d` are spent."""
        if self.smoothing:
            self.sum_a[rows] += _put_target(z - self.z[rows, None].to(z.dtype), self.t[rows], columns, 0).sum(1)
            self.sum_d[:, rows] += d.sum(2)
        _put_target(z, self.t[rows], columns, -torch.inf)  # its column is none of the others
        m, rest, u, peak = self.m[rows], self.rest[rows], self.u[:, rows], self.peak[:, rows]
        top = torch.maximum(m, z.amax(1))
        shrink = torch.exp(m - top)
        e = z.sub_(top[:, None]).exp_()
        torch.maximum(peak, d.amax(2), out=peak)
        rest.mul_(shrink).add_(e.sum(1))
        u.mul_(shrink).add_(d.expm1_().mul_(e).sum(2))
        m.copy_(top)

    def s(self) -> Tensor:
        return self.rest + torch.exp(self.z - self.m)

    def loss(self) -> Tensor:
        return _loss(self.m, self.rest, self.z)

    def large(self) -> Tensor:
        """(Q, N) where log1p(u / s) would not do; a NaN is such a place, and stays NaN there."""
        ratio = self.u / self.s()
        return ~((ratio > -0.5) & (ratio < torch.inf) & (self.peak <= LARGEST_EXPM1))

    def smoothed(self, base: Tensor, delta: Tensor, V: int) -> tuple[Tensor, Tensor]:
        """Label smoothing adds eps (z_t - mean z) to the loss, and eps (d_t - mean d) to its change."""
        if not self.smoothing:
            return base, delta
        return base - self.smoothing * (self.sum_a / V), delta - self.smoothing * (self.sum_d / V)


class _After:
    """What the loss after a change needs: the same sum of the changed logits, its own maximum running along."""

    def __init__(self, at: _Target):
        self.t, self.z = at.t, at.z
        self.m = torch.full_like(at.d, torch.finfo(at.d.dtype).min)
        self.rest = torch.zeros_like(at.d, dtype=at.z.dtype)

    def fold(self, rows: slice, columns: slice, z: Tensor, d: Tensor) -> None:
        after = _put_target(z + d, self.t[rows], columns, -torch.inf)
        m, rest = self.m[:, rows], self.rest[:, rows]
        top = torch.maximum(m, after.amax(2))
        rest.mul_(torch.exp(m - top)).add_(after.sub_(top[..., None]).exp_().sum(2))
        m.copy_(top)

    def loss(self) -> Tensor:
        return _loss(self.m, self.rest, self.z)


def _put_target(y: Tensor, t: Tensor, columns: slice, value: float) -> Tensor:
    """y (..., n, P) with `value` written in each row's target column, where the columns of this panel hold it."""
    place = t - columns.start
    inside = ((place >= 0) & (place < y.shape[-1]))[:, None]
    place = place.clamp(0, y.shape[-1] - 1)[:, None].expand(*y.shape[:-1], 1)
    return y.scatter_(-1, place, y.gather(-1, place).masked_fill_(inside, value))


def _loss(m: Tensor, rest: Tensor, z_t: Tensor) -> Tensor:
    """-log softmax of the target. Where it leads log1p keeps the digits of a small loss."""
    lead = z_t - m  # in float64, and so is what follows: e^lead of a memorised target is far beyond float32
    return torch.where(lead >= 0, torch.log1p(rest * torch.exp(-lead)), torch.log(rest + torch.exp(lead)) - lead)
