"""Whether steps were small: what half of each does to a few training samples is half of what the whole does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finf_fast.lowrank import LowRank
from finf_fast.update import Update

__all__ = ["QUERIES", "SAMPLES", "compared", "evenly", "with_halves"]

QUERIES = 8  # updates looked at, and samples: a stack of 17 on 64 samples, next to nothing beside a sweep
SAMPLES = 64


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` of the numbers below ``count``, evenly spread."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most))})


def with_halves(updates: Sequence[Update]) -> list[Update]:
    """The updates, and after them each one's half; buffers do not halve, so only weights may have moved."""
    return [*updates, *(replace(u, params={n: _half(c) for n, c in u.params.items()}) for u in updates)]


def compared(delta: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """What to report of the changes (2q, S) under q updates and under their halves.

    ``departure`` is ‖Δ − 2 Δ½‖ / ‖Δ‖ of the worst query, 0 where everything is linear; ``rank_agreement`` the smallest
    Spearman correlation between the two orders of the samples.
    """
    whole, half = np.split(np.asarray(delta, dtype=np.float64), 2)
    size = np.linalg.norm(whole, axis=1)
    departures = np.linalg.norm(whole - 2 * half, axis=1) / np.where(size > 0, size, 1.0)
    agreements = [_spearman(a, b) for a, b in zip(whole, half, strict=True)]
    return {
        "queries": list(names),
        "samples": whole.shape[1],
        "departure": float(departures.max()),
        "rank_agreement": float(min(agreements)),
    }


def _half(change: Tensor | LowRank) -> Tensor | LowRank:
    return change.scaled(0.5) if isinstance(change, LowRank) else change * 0.5


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    """1 where there is nothing to order."""
    ranks = torch.tensor(np.stack([_ranks(a), _ranks(b)]))
    found = float(torch.corrcoef(ranks)[0, 1]) if len(a) > 1 else 1.0
    return found if found == found else 1.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """Places in ascending order, equal values sharing their mean."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[place.reshape(-1)]
