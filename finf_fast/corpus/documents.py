"""Samples of different lengths in one stream of tokens: what Megatron's, datatrove's and OLMo's have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finf_fast.corpus.base import Corpus, runs_of
from finf_fast.corpus.delivery import as_stored, integers
from finf_fast.corpus.files import MappedArray, MappedFile
from finf_fast.corpus.undecoded import Undecoded, tokens_apart

__all__ = ["DocumentCorpus", "check_max_length"]


class DocumentCorpus(Corpus):
    """Documents of a token stream; a batch is a dict of ``input_ids`` and ``attention_mask``, (B, L) int64 each.

    L is the length of the longest document of the batch; shorter ones are padded right with id 0 and mask 0. An empty
    document is a row without a token: it has no loss, and no influence.

    Args:
        tokens: the stream, a mapped array (N,) of integers.
        samples: S, how many documents.
        max_length: tokens of a document that are read, from its start; None for all. :meth:`describe` tells it.
        transform: callable on each batch.
    """

    _as_stored = False

    def __init__(
        self,
        tokens: MappedArray,
        samples: int,
        max_length: int | None = None,
        transform: Callable[[Any], Any] | None = None,
    ):
        super().__init__(samples, transform)
        self._tokens, self.max_length = tokens, check_max_length(max_length)

    def lengths(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) int64 tokens of each document, as they are read; the tokens themselves stay on the disk."""
        counts = self._spans(start, stop)[1]
        return counts if self.max_length is None else np.minimum(counts, self.max_length)

    def undecoded(self) -> Undecoded | None:
        """See :meth:`Corpus.undecoded`; masks, which are stored nowhere, are bytes."""
        return tokens_apart(self, [self._tokens.dtype])

    @abstractmethod
    def _spans(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """First token and number of tokens, (stop - start,) int64 each, inside the stream: checked here."""

    def __getitem__(self, index: int) -> Any:
        """One document without padding; an empty one has no token, as in its file."""
        sample = super().__getitem__(index)
        if self.transform is not None:
            return sample
        there = int(sample["attention_mask"].sum())
        return {key: row[:there] for key, row in sample.items()}

    def _rows(self, start: int, stop: int) -> dict[str, Tensor]:
        return self._padded(*self._spans(start, stop))

    def _taken(self, indices: np.ndarray) -> dict[str, Tensor]:
        spans = [self._spans(start, stop) for start, stop in runs_of(indices)]
        return self._padded(*map(np.concatenate, zip(*spans, strict=True)))

    def _padded(self, firsts: np.ndarray, counts: np.ndarray) -> dict[str, Tensor]:
        if self.max_length is not None:
            counts = np.minimum(counts, self.max_length)
        longest = max(1, int(counts.max()))
        ids = (as_stored if self._as_stored else integers)(self._tokens, firsts, longest, counts)
        mask = torch.arange(longest) < torch.from_numpy(counts)[:, None]
        return {"input_ids": ids, "attention_mask": mask.to(torch.uint8 if self._as_stored else torch.int64)}

    def _files(self) -> list[MappedFile]:
        return [self._tokens.file]

    def _settings(self) -> dict[str, Any]:
        return {"stored_dtype": self._tokens.dtype.name, "max_length": self.max_length}

    def _notes(self) -> dict[str, Any]:
        return {"tokens": self._tokens.shape[0]}

    def _place(self, index: int) -> str:
        return self._tokens.place(int(self._spans(index, index + 1)[0][0]))


def check_max_length(value: Any) -> int | None:
    """``max_length`` as given, or the error that says what it should be."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"max_length: wanted an integer or None, got {value!r}")
    if value < 1:
        raise ValueError(f"max_length: wanted 1 or more tokens, got {value}")
    if value >= 2**63:  # as tokenizers say that they have no limit
        raise ValueError(f"max_length: wanted fewer tokens than {2**63}, or None for all, got {value}")
    return int(value)
