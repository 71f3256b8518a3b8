"""What a demo hands back: plain records, so that the command line prints them and tests look into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["Found", "Result", "Way", "hits", "ranks"]


@dataclass(frozen=True)
class Found:
    """One query and where its known source came out.

    Attributes:
        query: its name.
        source: index of the true source in the training set.
        rank: place of the source among all training samples, 1 = the most helpful.
        influence: of the source, as scored.
        near: place of the near duplicate, where one was planted.
    """

    query: str
    source: int
    rank: int
    influence: float
    near: int | None = None


@dataclass(frozen=True)
class Way:
    """One way to score, and how often it put the true source first or among the first five (shares of all queries).

    Each (top-1, top-5): ``raw`` orders by the score as it comes, ``over_spread`` by it over each sample's spread.
    """

    name: str
    raw: tuple[float, float]
    over_spread: tuple[float, float]


@dataclass(frozen=True)
class Result:
    """A finished demo.

    Attributes:
        title: what it was about.
        found: a line a query.
        ways: ways to score beside each other; the first is the one that ``found`` and the page show.
        notes: what came out, in sentences.
        folder: results: scores and data.
        page: the HTML page.
        seconds: stage -> wall time.
    """

    title: str
    found: tuple[Found, ...]
    ways: tuple[Way, ...]
    notes: tuple[str, ...]
    folder: Path
    page: Path
    seconds: dict[str, float]


def ranks(values: np.ndarray, sources: Sequence[int]) -> np.ndarray:
    """(Q,) place of each query's source among all samples, 1 = first; equals and NaN count against the source.

    Args:
        values: (Q, S) what is ordered, the largest first.
        sources: (Q,) sample that is looked for.
    """
    own = values[np.arange(len(values)), np.asarray(sources)][:, None]
    return (~(values < own)).sum(1)


def hits(places: np.ndarray) -> tuple[float, float]:
    """Shares of queries whose source came first, and among the first five."""
    return float((places == 1).mean()), float((places <= 5).mean())
