"""A sample of a corpus that stands for all of it."""

from __future__ import annotations

import numpy as np


def evenly(samples: int, count: int, seed: int, name: str = "samples") -> np.ndarray:
    """(count,) int64 ascending: one sample of each of ``count`` equal stretches of a corpus, so that none is left out.

    Args:
        samples: S of the corpus.
        count: 1 to S.
        seed: of the draw.
        name: what errors call ``count``.

    Raises:
        TypeError, ValueError: a count that is not as above.
    """
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name}: wanted a whole number, got {count!r}")
    if not 1 <= count <= samples:
        raise ValueError(f"{name}: wanted 1 to the corpus' {samples}, got {count}")
    edges = np.arange(count + 1) * samples // count
    within = np.random.default_rng(seed).random(count)
    return (edges[:-1] + (within * np.diff(edges)).astype(np.int64)).astype(np.int64)
