"""OLMo's and dolma's tokenized parts: raw tokens under the name ``.npy``, their documents in a ``.csv.gz`` beside.

Each line of the table is ``start,end,id,src,loc``; start and end count tokens, the end is not included.
"""

from __future__ import annotations

import csv
import gzip
import os
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from finf_fast.corpus.documents import DocumentCorpus
from finf_fast.corpus.files import MappedArray, MappedFile
from finf_fast.records import DamagedFile

__all__ = ["OlmoCorpus", "table_of"]

DTYPES = ("uint16", "uint32")


class OlmoCorpus(DocumentCorpus):
    """Documents of a pair ``part-*.npy`` and ``part-*.csv.gz``; the table is held in memory, 16 bytes a document.

    Args:
        path: of the ``.npy``.
        dtype: ``"uint16"``, the default, or ``"uint32"`` for vocabularies above 65,536.
        max_length, transform: see :class:`DocumentCorpus`.

    Raises:
        FileNotFoundError: one of the two is missing.
        DamagedFile: a table that cannot be read, or a document that is not inside the tokens.
    """

    format = "olmo"

    def __init__(
        self,
        path: str | os.PathLike,
        dtype: str | None = None,
        max_length: int | None = None,
        transform: Callable[[Any], Any] | None = None,
    ):
        if dtype not in (None, *DTYPES):
            raise ValueError(f"dtype: wanted one of {DTYPES}, got {dtype!r}")
        data, self._table = MappedFile(path), MappedFile(table_of(path))
        item = np.dtype(dtype or "uint16").newbyteorder("<")
        if data.size % item.itemsize:
            raise DamagedFile(f"{data.name}: wanted whole {item.name} tokens, got {data.size} bytes")
        tokens = MappedArray(data, 0, item, (data.size // item.itemsize,))
        self._starts, self._ends = _documents(self._table.path, tokens.shape[0])
        super().__init__(tokens, len(self._starts), max_length, transform)

    def _spans(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        starts = self._starts[start:stop]
        return starts, self._ends[start:stop] - starts

    def _digest(self, hasher: Any) -> None:
        self._table.digest(hasher)
        super()._digest(hasher)

    def _paths(self) -> list[str]:
        return [*super()._paths(), self._table.name]


def table_of(path: str | os.PathLike) -> str:
    """Name of the table beside a part."""
    return os.fspath(path).removesuffix(".npy") + ".csv.gz"


def _documents(path: str, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends (S,) int64, each document inside the tokens."""
    found: list[tuple[int, int]] = []
    try:
        with gzip.open(path, "rt", newline="") as file:
            for line, row in enumerate(csv.reader(file), 1):
                found.append((int(row[0]), int(row[1])))
                start, end = found[-1]
                if not 0 <= start <= end <= tokens:
                    raise DamagedFile(f"{path}, line {line}: wanted 0 <= start <= end <= {tokens}, got {start}, {end}")
    except DamagedFile:
        raise
    except (ValueError, IndexError) as error:
        raise DamagedFile(f"{path}, line {len(found) + 1}: wanted start,end,...: {error}") from None
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise DamagedFile(f"{path}, after line {len(found)}: cannot be read: {error}") from error
    both = np.array(found, np.int64).reshape(-1, 2)
    return np.ascontiguousarray(both[:, 0]), np.ascontiguousarray(both[:, 1])
