"""Scores that compare: each sample's answer to a query against its answers to others, or against its own loss.

Some samples answer to every step: the model is unsure of them. Raw scores put these first whatever is asked; divided by
what a sample does for all queries, its answer to this one stands out.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["HOWS", "KINDS", "Comparison", "check_kind", "groups_of", "joined", "root_mean_square"]

KINDS = ("rms", "zscore", "relatif", "ratio", "absolute")
ACROSS = ("rms", "zscore")  # kinds that look at other queries
FEW = 8  # queries that say nothing of a sample's own spread: a mean square of 8 is known to a third at best
HOWS = {"sum": np.sum, "mean": np.mean, "max": np.max}
CELLS = 1 << 22  # numbers worked on at a time: 32 MiB of float64, and as much again for each temporary


@dataclass(frozen=True)
class Comparison:
    """One kind of normalisation, ready for rows of samples.

    Args:
        kind: see :meth:`finf_fast.Scores.normalized`.
        signs: (Q',) +1 or -1, from delta to influence, background queries included.
        queries: Q, how many of these are asked for; the rest is background.
        self_influence: (S,), for ``"relatif"``.
        samples: S.

    Raises:
        ValueError: no such kind; too few queries to compare; ``self_influence`` missing, unasked, of another length,
            nowhere positive.
    """

    kind: str
    signs: np.ndarray
    queries: int
    self_influence: np.ndarray | None
    samples: int

    def __post_init__(self):
        check_kind(self.kind, len(self.signs))
        if (self.self_influence is not None) != (self.kind == "relatif"):
            raise ValueError("self_influence: wanted for kind='relatif', and for no other")
        if self.self_influence is not None and np.shape(self.self_influence) != (self.samples,):
            got = np.shape(self.self_influence)
            raise ValueError(f"self_influence: wanted shape ({self.samples},), one number a sample, got {got}")
        if self.self_influence is not None and not (np.asarray(self.self_influence) > 0).any():
            raise ValueError("self_influence: wanted positive numbers, as influence has on its diagonal, got none")

    def of(self, base: np.ndarray, delta: np.ndarray, first: int) -> np.ndarray:
        """(b, Q) float64 of b samples from row ``first`` on: base (b,), delta (b, Q')."""
        influence = delta.astype(np.float64) * self.signs
        asked = influence[:, : self.queries]
        if self.kind == "absolute":
            return np.abs(asked)
        if self.kind == "ratio":
            return _over(asked, 2 * base.astype(np.float64)[:, None] + delta[:, : self.queries])
        if self.kind == "relatif":
            own = np.asarray(self.self_influence[first : first + len(base)], np.float64)
            return _over(asked, np.sqrt(np.where(own > 0, own, np.nan))[:, None])
        if self.kind == "rms":
            return _over(asked, np.sqrt(_mean(np.square(influence))))
        centre = _mean(influence)
        deviation = np.sqrt(_mean(np.square(influence - centre)))
        return _over(asked - centre, np.where(deviation > _rounding(influence), deviation, 0.0))

    def blocks(self, base: np.ndarray, delta: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """First row and (b, Q) of every block of base (S,) and delta (S, Q'), a few MiB at a time."""
        rows = max(1, CELLS // delta.shape[1])
        for first in range(0, len(base), rows):
            yield first, self.of(base[first : first + rows], delta[first : first + rows], first)


def check_kind(kind: str, queries: int) -> None:
    """Whether so many queries, background included, can be normalised so; asked before work as well as after it.

    Raises:
        ValueError: no such kind; too few queries to compare.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: wanted one of {', '.join(KINDS)}, got {kind!r}")
    if kind in ACROSS and queries < FEW:
        raise ValueError(
            f"kind: {kind!r} compares with other queries and wants at least {FEW}, got {queries}; "
            "forward_inf(..., background=64), or --background 64, asks 64 training samples beside them"
        )


def groups_of(groups: Sequence[Sequence[int | str]] | Mapping[str, Sequence[int | str]], names: Sequence[str]) -> Any:
    """Lists of query numbers, of queries given by number or name.

    Raises:
        ValueError: no groups, an empty one, an unknown query.
    """
    lists = list(groups.values()) if isinstance(groups, Mapping) else list(groups)
    found = [[_query(query, names) for query in group] for group in lists]
    if not found or not all(found):
        raise ValueError(f"groups: wanted lists of at least one query each, got {groups!r}")
    return found


def joined(values: np.ndarray, groups: Sequence[Sequence[int]], how: str) -> np.ndarray:
    """(b, G) of values (b, Q)."""
    return np.stack([HOWS[how](values[:, group], axis=1) for group in groups], 1)


def root_mean_square(delta: np.ndarray) -> np.ndarray:
    """(S,) float64 over the queries of delta (S, Q), those that are not finite left out."""
    rows = max(1, CELLS // delta.shape[1])
    parts = [_mean(np.square(delta[first : first + rows], dtype=np.float64)) for first in range(0, len(delta), rows)]
    return np.sqrt(np.concatenate(parts)[:, 0])


def _mean(values: np.ndarray) -> np.ndarray:
    """(b, 1) over the columns that hold a finite number; NaN where none does."""
    there = np.isfinite(values)
    count = there.sum(1, keepdims=True)
    total = np.where(there, values, 0.0).sum(1, keepdims=True)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def _over(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """NaN where the scale is 0: a sample that answers to nothing has no place in an order."""
    scale = np.broadcast_to(scale, values.shape)
    with np.errstate(invalid="ignore"):  # an infinite loss over an infinite one is NaN, and may be
        return np.divide(values, scale, out=np.full(values.shape, np.nan), where=scale != 0)


def _rounding(values: np.ndarray) -> np.ndarray:
    """(b, 1) how far a mean of equal numbers may lie from them: a rounding for each of the sum's terms."""
    largest = np.abs(np.where(np.isfinite(values), values, 0.0)).max(1, keepdims=True)
    return largest * values.shape[1] * np.finfo(values.dtype).eps


def _query(query: int | str, names: Sequence[str]) -> int:
    if isinstance(query, str):
        if query not in names:
            raise ValueError(f"groups: wanted names of queries, got {query!r}")
        return list(names).index(query)
    number = operator.index(query)
    if not 0 <= number < len(names):
        raise ValueError(f"groups: wanted queries 0 to {len(names) - 1}, got {number}")
    return number
