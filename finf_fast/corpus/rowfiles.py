"""Corpus of fixed-size rows in mapped files, features and maybe labels: what `.npy` and IDX have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from finf_fast.corpus.arrays import ArrayCorpus, require_label_array
from finf_fast.corpus.base import Corpus
from finf_fast.corpus.delivery import Starts, integers
from finf_fast.corpus.files import MappedArray, MappedFile
from finf_fast.corpus.pixels import Pixels, apart
from finf_fast.corpus.undecoded import Undecoded

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
        super().__init__(features.shape[0], transform, features.file)
        if labels is not None:
            labels = _checked(labels, features)
        self._features, self._labels, self._pixels = features, labels, pixels

    def labelled(self, labels: MappedArray | np.ndarray | torch.Tensor) -> RowFileCorpus:
        """The same features with these labels, as ``labels`` above."""
        corpus = copy.copy(self)
        corpus._labels = _checked(labels, self._features)
        return corpus

    def _rows(self, start: int, stop: int) -> Any:
        x = self._pixels.rows(self._features, start, stop)
        if isinstance(self._labels, ArrayCorpus):
            return x, self._labels.read(start, stop)
        return self._labelled(x, range(start, stop))

    def _taken(self, indices: np.ndarray) -> Any:
        starts = indices * self._features.row_items
        x = self._pixels.runs(self._features, starts, self._features.shape[1:])
        if isinstance(self._labels, ArrayCorpus):
            return x, self._labels.take(indices)
        return self._labelled(x, indices)

    def _labelled(self, x: torch.Tensor, places: Starts) -> Any:
        return x if self._labels is None else (x, integers(self._labels, places, 1).view(-1))

    def _memory(self) -> list[Corpus]:
        return [self._labels] if isinstance(self._labels, ArrayCorpus) else []

    def undecoded(self) -> Undecoded | None:
        """See :meth:`Corpus.undecoded`."""
        return apart(self, self._pixels)

    def _files(self) -> list[MappedFile]:
        return [part.file for part in (self._features, self._labels) if isinstance(part, MappedArray)]

    def _settings(self) -> dict[str, Any]:
        return self._pixels.settings()

    def _like(self) -> Any:
        return self._features.shape[1:], str(self._features.dtype), self._labels is None

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
