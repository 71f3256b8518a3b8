"""Any map-style torch Dataset, the slow way in: every sample is made by the dataset's own code, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from finf_fast.corpus.arrays import digest_array, widened
from finf_fast.corpus.base import Corpus, callable_name, require_rows, tree_map
from finf_fast.corpus.collate import collate, unmasked_length

__all__ = ["DatasetCorpus"]

PROBES = 64  # samples looked at for the fingerprint and for differing lengths: a moment's work for any dataset


class DatasetCorpus(Corpus):
    """A map-style dataset: ``len(source)`` samples, ``source[i]`` a tensor, a number, a tuple or a dict of them.

    Without ``collate_fn`` samples are joined as DataLoader joins them, and dicts of differing lengths are padded right:
    ``labels`` with -100, everything else with 0. An ``attention_mask`` is made when ``input_ids`` were padded, and in
    every batch when a look at up to 64 samples found differing lengths, but never over rows in which ``position_ids``
    restart, several texts in each: these want one length, or a mask of their own. Integers other than pixels become
    int64.

    The content cannot be hashed, so the fingerprint is made of up to 64 samples: a dataset that draws at random gets
    another one each time, and so does not resume, which is right, for its scores could not be repeated either.

    Args:
        source: the dataset.
        collate_fn: list of samples → batch, instead of all this.
        transform: callable on each batch.

    Raises:
        TypeError: no length, no indexing, or a DataLoader.
        ValueError: no samples; samples that cannot be joined; rows of several texts that want a mask, as they are read.
    """

    format = "dataset"

    def __init__(
        self,
        source: Any,
        collate_fn: Callable[[list], Any] | None = None,
        transform: Callable[[Any], Any] | None = None,
    ):
        if not _is_map_style(source):
            wanted = "arrays, a path, or a map-style dataset (a length and samples by a stable index)"
            raise TypeError(f"source: wanted {wanted}, got {type(source).__name__}")
        if collate_fn is not None and not callable(collate_fn):
            raise TypeError(f"collate_fn: wanted a callable (samples) -> batch, got {type(collate_fn).__name__}")
        super().__init__(len(source), transform)
        self._source, self._collate_fn = source, collate_fn

    def _rows(self, start: int, stop: int) -> Any:
        return self._taken(np.arange(start, stop))

    def _taken(self, indices: np.ndarray) -> Any:
        samples = [self._sample(index) for index in indices.tolist()]
        if self._collate_fn is not None:
            batch, joined_by = self._collate_fn(samples), "collate_fn"
        else:
            batch, joined_by = collate(samples, unmasked_length(samples[0]) is not None and self._ragged), "source"
        require_rows(batch, len(samples), joined_by)
        return batch if self._collate_fn is not None else tree_map(widened, batch)

    def _sample(self, index: int) -> Any:
        try:
            return self._source[index]
        except Exception as error:
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(f"while the dataset made sample {index}")
            raise

    @cached_property
    def _ragged(self) -> bool:
        return len({unmasked_length(self._sample(index)) for index in self._probed()}) > 1

    def _probed(self) -> list[int]:
        count = min(PROBES, len(self))
        return [k * (len(self) - 1) // max(1, count - 1) for k in range(count)]

    def _digest(self, hasher: Any) -> None:
        for index in self._probed():
            tree_map(lambda tensor: digest_array(hasher, "", tensor), self._rows(index, index + 1))

    def _settings(self) -> dict[str, Any]:
        joined_by = None if self._collate_fn is None else callable_name(self._collate_fn)
        return {"dataset": callable_name(type(self._source)), "collate_fn": joined_by}


def _is_map_style(source: Any) -> bool:
    if isinstance(source, (str, bytes, DataLoader, IterableDataset)):
        return False
    return hasattr(source, "__len__") and hasattr(source, "__getitem__")
