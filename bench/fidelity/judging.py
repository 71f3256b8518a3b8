"""How good scores are, with an interval: the bootstrap over queries says what another draw of them might have given."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

__all__ = ["Estimate", "correlations", "first", "pearson", "sums_over_subsets"]

DRAWS = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean over queries, and where 95 % of bootstrap means lie."""

    mean: float
    low: float
    high: float

    @staticmethod
    def of(values: np.ndarray) -> Estimate:
        """Of (Q,) values; NaN counts as 0: a method that has no answer has not found it."""
        values = np.nan_to_num(np.asarray(values, np.float64))
        draws = np.random.default_rng(0).integers(0, len(values), (DRAWS, len(values)))
        low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
        return Estimate(float(values.mean()), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def sums_over_subsets(scores: np.ndarray, members: np.ndarray) -> np.ndarray:
    """(Q, M) what scores (Q, N) say of M subsets (M, n): the sum over a subset's samples."""
    return scores[:, members].sum(2)


def correlations(predicted: np.ndarray, true: np.ndarray) -> np.ndarray:
    """(Q,) Spearman's rank correlation of each row of (Q, M) with its row of the truth."""
    a, b = (rankdata(rows, axis=1) for rows in (predicted, true))
    a, b = (ranks - ranks.mean(1, keepdims=True) for ranks in (a, b))
    norm = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.divide((a * b).sum(1), norm, out=np.zeros(len(a)), where=norm > 0)


def pearson(predicted: np.ndarray, true: np.ndarray) -> Estimate:
    """Of two rows (G,), with the interval over draws of their pairs."""
    draws = np.random.default_rng(0).integers(0, len(true), (DRAWS, len(true)))
    a, b = (values[draws] - values[draws].mean(1, keepdims=True) for values in (predicted, true))
    norm = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    low, high = np.quantile((a * b).sum(1)[norm > 0] / norm[norm > 0], [0.025, 0.975])
    return Estimate(float(np.corrcoef(predicted, true)[0, 1]), float(low), float(high))


def first(scores: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """(Q,) whether each query's source (Q,) has the largest of its scores (Q, N), alone; NaN is never first."""
    values = np.nan_to_num(scores, nan=-np.inf)
    own = values[np.arange(len(sources)), sources]
    return (values >= own[:, None]).sum(1) == 1
