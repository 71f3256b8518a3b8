"""datatrove's tokenized datasets (nanotron): tokens in ``X.ds``, their documents' ends in ``X.ds.index``.

The index is a row of uint64, each the number of tokens up to a document's end. Which tokens count in training may be
said in ``X.ds.loss``, a byte each; every token is scored all the same, and the description says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from finf_fast.corpus.documents import DocumentCorpus
from finf_fast.corpus.files import MappedArray, MappedFile
from finf_fast.records import DamagedFile

__all__ = ["DatatroveCorpus"]

ITEMS = {2: "uint16", 4: "uint32"}


class DatatroveCorpus(DocumentCorpus):
    """Documents of a pair ``X.ds`` and ``X.ds.index``; two or four bytes a token, told by the two files' sizes.

    Args:
        path: of ``X.ds``.
        max_length, transform: see :class:`DocumentCorpus`.

    Raises:
        FileNotFoundError: one of the two is missing.
        DamagedFile: ends that decrease, or do not fit the size of the tokens' file.
    """

    format = "datatrove"

    def __init__(
        self,
        path: str | os.PathLike,
        max_length: int | None = None,
        transform: Callable[[Any], Any] | None = None,
    ):
        data, index = MappedFile(path), MappedFile(os.fspath(path) + ".index")
        if index.size == 0:
            raise ValueError(f"source: empty corpus, wanted a document's end in {index.name}, got an empty file")
        if index.size % 8:
            raise DamagedFile(f"{index.name}: wanted whole ends of 8 bytes, got {index.size} bytes")
        self._ends = MappedArray(index, 0, np.dtype("<u8"), (index.size // 8,))
        count = int(self._ends.rows(self._ends.shape[0] - 1, self._ends.shape[0], np.array)[0])
        item = data.size // count if count else 0
        if item not in ITEMS or item * count != data.size:
            raise DamagedFile(
                f"{data.name}: wanted {count} tokens of 2 or 4 bytes, as its index ends, got {data.size} bytes"
            )
        tokens = MappedArray(data, 0, np.dtype(ITEMS[item]).newbyteorder("<"), (count,))
        super().__init__(tokens, self._ends.shape[0], max_length, transform)

    def _spans(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        # One edge more on either side than these documents have: an overlap is seen from each of them alone.
        first, last = max(0, start - 1), min(stop + 1, self._ends.shape[0])
        ends = self._ends.rows(max(0, first - 1), last, np.array)
        edges = ends if first else np.append(np.uint64(0), ends)
        wrong = np.flatnonzero((edges[1:] < edges[:-1]) | (edges[1:] > self._tokens.shape[0]))
        if len(wrong):
            at = int(wrong[0])
            wanted = f"an end from {int(edges[at])} to {self._tokens.shape[0]}"
            raise DamagedFile(f"{self._ends.place(first + at)}: wanted {wanted} tokens, got {int(edges[at + 1])}")
        own = edges[start - first : stop - first + 1].astype(np.int64)
        return own[:-1], np.diff(own)

    def _notes(self) -> dict[str, Any]:
        beside = self._tokens.file.path + ".loss"
        unread = {"not_read": f"{beside}: every token is scored"} if os.path.exists(beside) else {}
        return {**super()._notes(), **unread}

    def _files(self) -> list[MappedFile]:
        return [*super()._files(), self._ends.file]
