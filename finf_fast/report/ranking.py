"""Which samples to show: the order of all samples for one query, raw or measured in each sample's own spread."""

from __future__ import annotations

from typing import Any

import numpy as np


def spread(scores: Any) -> np.ndarray:
    """(S,) float64: root mean square of each sample's influence over the queries.

    Samples that the model is unsure of answer to every step. Divided by their spread, they no longer stand in front of
    the one sample that answers to this query only. It takes queries enough to tell: ten or more.

    Args:
        scores: a :class:`finf_fast.Scores` of S samples and Q queries.

    Raises:
        ValueError: fewer than two queries, which would leave nothing but signs.
    """
    queries = len(scores.delta) + len(scores.background)
    if queries < 2:
        raise ValueError(f"scores: wanted at least 2 queries to compare, got {queries}")
    return scores.spread()


class Ranking:
    """All samples in order of their influence on one query; one column of S numbers is held at a time.

    Args:
        scores: a :class:`finf_fast.Scores`.
        query: 0 to Q-1.
        scale: (S,) what each sample's influence is divided by, as from :func:`spread`; None leaves it.

    Attributes:
        values: (S,) float64, what is ordered: influence, positive = helpful, over scale. NaN is never shown.
        sign: what a delta is multiplied by to become influence.
        first: corpus index of the first sample scored.

    Raises:
        ValueError: no such query, or a scale of another length.
    """

    def __init__(self, scores: Any, query: int, scale: np.ndarray | None = None):
        if not 0 <= query < len(scores.names):
            raise ValueError(f"query: wanted 0 to {len(scores.names) - 1}, got {query}")
        self.sign = 1.0 if scores.directions[query] == "ascent" else -1.0
        self.first = int(scores.indices[0])
        self._influence = scores.delta[query].astype(np.float64) * self.sign
        self.values = self._influence if scale is None else _over(self._influence, scale)

    def top(self, k: int, tail: str = "helpful") -> list[int]:
        """Corpus indices of at most k samples, strongest first; only those that truly helped (or harmed)."""
        sign = 1.0 if tail == "helpful" else -1.0
        strength = np.where(np.isnan(self.values), -np.inf, sign * self.values)
        place = np.argpartition(-strength, min(k, len(strength)) - 1)[:k]
        order = place[np.lexsort((place, -strength[place]))]
        return [self.first + int(i) for i in order if strength[i] > 0]

    def rank(self, index: int) -> int:
        """Place of a sample among all, 1 = the most helpful; equals count against it."""
        own = self.values[self._row(index)]
        if np.isnan(own):
            return len(self.values)
        return int((self.values >= own).sum())

    def value(self, index: int) -> float:
        """What a sample is ordered by."""
        return float(self.values[self._row(index)])

    def raw(self, index: int) -> float:
        """A sample's influence as scored."""
        return float(self._influence[self._row(index)])

    def _row(self, index: int) -> int:
        row = index - self.first
        if not 0 <= row < len(self.values):
            raise ValueError(f"index: wanted {self.first} to {self.first + len(self.values) - 1}, got {index}")
        return row


def _over(influence: np.ndarray, scale: np.ndarray) -> np.ndarray:
    scale = np.asarray(scale, dtype=np.float64)
    if scale.shape != influence.shape:
        raise ValueError(f"scale: wanted shape {influence.shape}, one number a sample, got {scale.shape}")
    return np.divide(influence, scale, out=np.full_like(influence, np.nan), where=scale > 0)
