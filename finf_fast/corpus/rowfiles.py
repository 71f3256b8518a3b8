"""Corpus of fixed-size rows in mapped files, features and maybe labels: what `.npy` and IDX have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from finf_fast.corpus.arrays import ArrayCorpus, require_label_array
from finf_fast.corpus.base import Corpus
from finf_fast.corpus.delivery import integers
from finf_fast.corpus.files import MappedArray
from finf_fast.corpus.pixels import Pixels

__all__ = ["RowFileCorpus"]


class RowFileCorpus(Corpus):
    """Features from a mapped array, decoded by :class:`Pixels`, with integer labels from a file or from memory.

    Args:
        features: (S, …) in a file whose size has been checked.
        labels: (S,) integers, mapped or in memory, delivered as int64; None for a corpus of features alone.
        pixels: decoder of the features.
        transform: callable on each batch.

    Raises:
        ValueError, TypeError: labels that are not (S,) integers.
    """

    def __init__(
        self,
        features: MappedArray,
        labels: MappedArray | np.ndarray | torch.Tensor | None,
        pixels: Pixels,
        transform: Callable[[Any], Any] | None = None,
    ):
        super().__init__(features.shape[0], transform)
        if labels is not None:
            labels = _checked(labels, features)
        self._features, self._labels, self._pixels = features, labels, pixels

    def _rows(self, start: int, stop: int) -> Any:
        x = self._pixels.rows(self._features, start, stop)
        if self._labels is None:
            return x
        if isinstance(self._labels, MappedArray):
            return x, integers(self._labels, range(start, stop), 1).view(-1)
        return x, self._labels.read(start, stop)

    def _digest(self, hasher: Any) -> None:
        self._features.file.digest(hasher)
        if isinstance(self._labels, MappedArray):
            self._labels.file.digest(hasher)
        elif self._labels is not None:
            hasher.update(self._labels.fingerprint.encode())

    def _settings(self) -> dict[str, Any]:
        return self._pixels.settings()

    def _paths(self) -> list[str]:
        return [part.file.name for part in (self._features, self._labels) if isinstance(part, MappedArray)]

    def _place(self, index: int) -> str:
        return self._features.place(index)


def _checked(labels: Any, features: MappedArray) -> MappedArray | ArrayCorpus:
    """Labels of the right kind and number; those in memory as a corpus of their own, for its reads and its hash."""
    mapped = isinstance(labels, MappedArray)
    if not mapped:
        require_label_array(labels)
    elif len(labels.shape) != 1 or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels: wanted integers of shape (S,) in {labels.file.name}, got {labels.dtype} {labels.shape}"
        )
    count = labels.shape[0]
    if count != features.shape[0]:
        raise ValueError(f"labels: wanted {features.shape[0]} labels, one a row of {features.file.name}, got {count}")
    return labels if mapped else ArrayCorpus(labels)
