"""The change that every query makes to one parameter, packed to be multiplied with the gradients of all samples.

With g_t the gradient at a linear layer's output and a_t its input at position t, a sample's gradient is
G = Σ_t g_t a_tᵀ and its product with the change u vᵀ is Σ_t (g_t · u) (a_t · v), column by column: two skinny products,
and G is never formed. Over many positions it is cheaper to form G of one layer, for a few samples at a time, and to
multiply it with all changes; which is the cheaper is counted, not guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from finf_fast.lowrank import LowRank
from finf_fast.reference import product
from finf_fast.runs import runs

__all__ = ["Change", "chunked", "packed"]

ROOM = 32 << 20  # bytes of what is made for one chunk of samples: more leaves a processor's cache far behind


@dataclass(frozen=True, eq=False)
class Change:
    """What Q queries do to one parameter of shape (rows, *columns).

    Attributes:
        queries: Q of the sweep, those included that leave this parameter as it is.
        low: numbers of the q queries whose change is factors; u: (rows, q·r), v: (columns, q·r), a query's r columns
            side by side.
        whole: numbers of the p queries whose change is dense; dense: (rows·columns, p).
    """

    queries: int
    low: tuple[int, ...]
    u: Tensor | None
    v: Tensor | None
    whole: tuple[int, ...]
    dense: Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.u, self.v, self.dense) if t is not None)

    @property
    def dtype(self) -> torch.dtype:
        """In which products are taken: what meets a parameter of half precision may be in float32."""
        return (self.dense if self.u is None else self.u).dtype

    def rows(self, left: Tensor, right: Tensor) -> Tensor:
        """Of Σ_t left_t rightᵀ_t: left (B, T, rows), right (B, T, columns) -> (B, Q)."""
        left, right = left.to(self.dtype), right.to(self.dtype)
        formed = self._formed_is_less(left.shape[1], left.shape[2], right.shape[2])

        def part(at: slice) -> Tensor:
            return self.formed(left[at].mT @ right[at]) if formed else self._skinny(left[at], right[at])

        each = left.shape[2] * right.shape[2] if formed else 2 * left.shape[1] * self.u.shape[1]
        return chunked(part, len(left), each * left.element_size())

    def ids(self, ids: Tensor, right: Tensor) -> Tensor:
        """Of Σ_t e(ids_t) rightᵀ_t, an embedding's gradient: ids (B, T), right (B, T, columns) -> (B, Q)."""
        right = right.to(self.dtype)

        def part(at: slice) -> Tensor:
            found = right.new_zeros(len(ids[at]), self.queries, dtype=_wide(right))
            if self.u is not None:
                self._add(found, self.low, self._summed(self.u[ids[at]], _times(right[at], self.v)))
            if self.dense is not None:
                table = self.dense.view(-1, right.shape[2], len(self.whole))
                for column, query in enumerate(self.whole):
                    found[:, query] += (table[:, :, column][ids[at]] * right[at]).sum((1, 2), dtype=found.dtype)
            return found

        width = 0 if self.u is None else self.u.shape[1]
        return chunked(part, len(ids), ids.shape[1] * (2 * width + right.shape[2]) * right.element_size())

    def formed(self, gradient: Tensor) -> Tensor:
        """Of gradients that are there: (B, rows, columns), or (B, *shape) of a parameter without factors -> (B, Q)."""
        found = gradient.new_zeros(len(gradient), self.queries, dtype=_wide(gradient))
        if self.dense is not None:
            self._add(found, self.whole, _times(gradient.flatten(1).to(self.dense.dtype), self.dense))
        if self.u is not None:
            gradient = gradient.reshape(len(gradient), len(self.u), -1).to(self.u.dtype)
            self._add(found, self.low, self._summed(self.u.expand(len(gradient), -1, -1), _times(gradient, self.v)))
        return found

    def t(self, shape: torch.Size) -> Change:
        """Of the transpose, where this one is of a matrix of that shape."""
        dense = self.dense
        if dense is not None:
            dense = dense.view(*shape, -1).transpose(0, 1).flatten(0, 1)
        return replace(self, u=self.v, v=self.u, dense=dense)

    def _formed_is_less(self, positions: int, rows: int, columns: int) -> bool:
        """Whether forming a layer's gradient takes fewer products than two skinny ones at every position."""
        if self.u is None or self.dense is not None:
            return True
        skinny, width = positions * (rows + columns) * self.u.shape[1], rows * columns
        return width * (positions + self.u.shape[1]) < skinny

    def _skinny(self, left: Tensor, right: Tensor) -> Tensor:
        found = left.new_zeros(len(left), self.queries, dtype=_wide(left))
        self._add(found, self.low, self._summed(_times(left, self.u), _times(right, self.v)))
        return found

    def _summed(self, left: Tensor, right: Tensor) -> Tensor:
        """Σ over positions and a query's columns of left ∘ right: (B, T, q·r) twice -> (B, q)."""
        wide = _wide(right)
        total = (left * right if right.dtype == wide else left.to(wide) * right).sum(1)
        return total.view(len(total), len(self.low), -1).sum(2)

    def _add(self, found: Tensor, queries: tuple[int, ...], part: Tensor) -> None:
        if len(queries) == self.queries:
            found += part
        else:
            for mine, theirs in runs(queries):
                found[:, theirs] += part[:, mine].to(found.dtype)


def packed(changes: Mapping[int, Tensor | LowRank], queries: int, device: torch.device, dtype: torch.dtype) -> Change:
    """One parameter's changes, by number of the query, of Q in all."""
    low = {q: c for q, c in changes.items() if isinstance(c, LowRank) and c.rank}
    whole = {q: c for q, c in changes.items() if not isinstance(c, LowRank)}
    u, v, dense = None, None, None
    if low:
        rank = max(c.rank for c in low.values())
        u, v = (_side([getattr(c, side) for c in low.values()], rank, device, dtype) for side in "uv")
    if whole:
        vector = next(iter(whole.values())).dim() < 2  # small, and met by sums in float32 at least
        kind = torch.promote_types(dtype, torch.float32) if vector else dtype
        dense = torch.stack([c.reshape(-1).to(device, kind) for c in whole.values()], 1)
    return Change(queries, tuple(low), u, v, tuple(whole), dense)


def _side(factors: Sequence[Tensor], rank: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(size, q·rank): factors side by side, with columns of zeros up to the common rank."""
    out = torch.zeros(len(factors[0]), len(factors), rank, device=device, dtype=dtype)
    for number, factor in enumerate(factors):
        out[:, number, : factor.shape[1]] = factor
    return out.flatten(1)


def chunked(part: Callable[[slice], Tensor], samples: int, bytes_each: int) -> Tensor:
    """The parts of a few samples at a time, one below the other."""
    step = max(1, ROOM // max(1, bytes_each))
    return torch.cat([part(slice(first, min(first + step, samples))) for first in range(0, samples, step)])


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """(..., n) · (n, k), by the fast product of the processor."""
    return product.linear(x, matrix.T)


def _wide(tensor: Tensor) -> torch.dtype:
    """Of sums: half precision is added up in float32."""
    return torch.promote_types(tensor.dtype, torch.float32)
