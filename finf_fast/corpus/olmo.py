"""OLMo's and dolma's tokenized documents: raw tokens in ``part.npy``, which is no NPY file, and ``part.csv.gz``.

A row of the table, which has no heading: start, end (exclusive) in tokens, id, source, line.
"""

from __future__ import annotations

import csv
import io
import os
import reprlib
from array import array
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import numpy as np

from finf_fast.corpus.documents import DocumentCorpus
from finf_fast.corpus.files import MappedArray, MappedFile
from finf_fast.corpus.unpack import BROKEN, unpacking
from finf_fast.records import DamagedFile

__all__ = ["OlmoCorpus", "olmo_table"]

ITEMS = {2: "uint16", 4: "uint32"}
HIGHEST = 2**63 - 1  # of an offset
LONGEST = 1 << 20  # characters of a row, which has two numbers and short names; a few packed bytes may claim any number


class OlmoCorpus(DocumentCorpus):
    """Documents of a pair ``part.npy`` and ``part.csv.gz``; two or four bytes a token, told by the last end.

    The table is unpacked and checked at once, about a million rows a second, and kept as 16 bytes a document.

    Args:
        path: of ``part.npy``.
        max_length, transform: see :class:`DocumentCorpus`.

    Raises:
        FileNotFoundError: one of the two is missing.
        DamagedFile: a table that cannot be unpacked, rows that overlap, or ends that do not fit the tokens' file.
    """

    format = "olmo"

    def __init__(
        self,
        path: str | os.PathLike,
        max_length: int | None = None,
        transform: Callable[[Any], Any] | None = None,
    ):
        data, self._table = MappedFile(path), MappedFile(olmo_table(path))
        edges = _edges(self._table)
        count = int(edges[-1, 1]) if len(edges) else 0
        if count == 0:
            raise ValueError(f"source: empty corpus, wanted a document with tokens in {self._table.name}, got none")
        item = data.size // count
        if item not in ITEMS or item * count != data.size:
            raise DamagedFile(
                f"{data.name}: wanted {count} tokens of 2 or 4 bytes, as {self._table.name} ends, got {data.size} bytes"
            )
        self._edges = edges
        tokens = MappedArray(data, 0, np.dtype(ITEMS[item]).newbyteorder("<"), (count,))
        super().__init__(tokens, len(edges), max_length, transform)

    def _spans(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        firsts, lasts = self._edges[start:stop].T
        return firsts, lasts - firsts

    def _files(self) -> list[MappedFile]:
        return [*super()._files(), self._table]


def olmo_table(path: str | os.PathLike) -> str:
    """Path of the table that goes with the tokens."""
    return os.fspath(path).removesuffix(".npy") + ".csv.gz"


def _edges(table: MappedFile) -> np.ndarray:
    """(S, 2) int64 first token and end of each document, in order and without overlap."""
    found = array("q")  # eight bytes a number; a list of Python's would be eighty
    end = row = 0
    try:
        for row, (first, last) in enumerate(_rows(table), 1):
            if not end <= first <= last <= HIGHEST:
                raise DamagedFile(f"{table.name}, row {row}: wanted {end} <= start <= end, got {first}, {last}")
            found.extend((first, last))
            end = last
    except (*BROKEN, UnicodeDecodeError, csv.Error) as error:
        raise DamagedFile(f"{table.name}, after row {row}: the table cannot be read: {error}") from error
    table.require_same(0)
    return np.frombuffer(found, np.int64).reshape(-1, 2)


def _rows(table: MappedFile) -> Iterator[tuple[int, int]]:
    with io.TextIOWrapper(unpacking(table), newline="", encoding="utf-8") as text:
        lines, columns = _Lines(text), None
        for number, row in enumerate(csv.reader(lines, strict=True), 1):
            lines.room = LONGEST
            try:
                first, last = int(row[0]), int(row[1])
            except (IndexError, ValueError):
                got = reprlib.repr(row[:2])
                raise DamagedFile(f"{table.name}, row {number}: wanted start and end, got {got}") from None
            # A quote that does not end takes the next row for text, up to where that one has a quote of its own.
            columns = columns or len(row)
            if len(row) != columns:
                wanted = f"{columns} columns, as in the rows before"
                raise DamagedFile(f"{table.name}, row {number}: wanted {wanted}, got {len(row)}")
            yield first, last


class _Lines:
    """Lines of a text, up to ``room`` characters, which whoever takes a row from them renews."""

    def __init__(self, text: TextIO):
        self._text, self.room = text, LONGEST

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._text.readline(self.room)
        self.room -= len(line)
        if not self.room:
            raise csv.Error(f"wanted rows of fewer than {LONGEST} characters, got a longer one")
        if not line:
            raise StopIteration
        return line
