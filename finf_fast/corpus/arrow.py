"""Hugging Face datasets on disk: Arrow streams, and the folder with ``state.json`` that ``save_to_disk`` leaves.

pyarrow reads what stands between the batches of a stream and says where each column lies; the numbers themselves are
never loaded but read from there, as from any other file. pyarrow comes with ``pip install finf_fast[arrow]``.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finf_fast.corpus.base import Corpus
from finf_fast.corpus.delivery import Starts, as_stored, integers
from finf_fast.corpus.documents import check_max_length
from finf_fast.corpus.files import MappedArray, MappedFile
from finf_fast.corpus.stream import Column, map_stream
from finf_fast.corpus.undecoded import Undecoded, is_narrow, tokens_apart
from finf_fast.records import DamagedFile

__all__ = ["ArrowCorpus", "SelectedCorpus"]

FILLER = {"labels": -100}  # as in collate.py
# Edges are gathered row by row where those that follow each other come in runs of fewer rows on the average, or of
# lengths so different that the room for the longest, for each, is more than so many times the rows.
SHORT, WIDE = 16, 4


class ArrowCorpus(Corpus):
    """Rows of one Arrow stream; a batch is a dict of its columns.

    A column of numbers is delivered as (B,), one of lists as (B, L), L the longest of the batch: ``labels`` padded
    right with -100, others with 0. Integers become int64, floats stay as stored. Where ``input_ids`` come without an
    ``attention_mask`` (B, L) int64, one is made.

    Args:
        path: the stream.
        columns: names; default those of ``input_ids``, ``attention_mask``, ``token_type_ids`` and ``labels`` that are
            there.
        max_length: of lists, how many items are read, from their start; None for all.
        transform: callable on each batch.

    Raises:
        ImportError: pyarrow is missing.
        DamagedFile: no whole Arrow stream.
        ValueError, TypeError: columns that are not there, or hold something else than numbers and lists of them;
            ``position_ids`` without an ``attention_mask``, which may be packed texts, unless columns without them are
            named.
    """

    format = "arrow"
    _as_stored = False

    def __init__(
        self,
        path: str | os.PathLike,
        columns: Sequence[str] | None = None,
        max_length: int | None = None,
        transform: Callable[[Any], Any] | None = None,
    ):
        self._file, self.max_length = MappedFile(path), check_max_length(max_length)
        self._starts, self._columns = map_stream(self._file, _names(columns))
        self._flat: dict[np.dtype, MappedArray] = {}
        super().__init__(int(self._starts[-1]), transform)

    def __getitem__(self, index: int) -> Any:
        """One row without padding; an empty list has no item, as in its file."""
        sample, index = super().__getitem__(index), self._position(index)
        if self.transform is not None:
            return sample
        where = self._where(np.array([index]))
        lists = {c.name: int(self._spans(c, *where)[1][0]) for c in self._columns if c.is_ragged}
        lists |= {"attention_mask": lists["input_ids"]} if self._makes_mask and "input_ids" in lists else {}
        return {name: value[: lists[name]] if name in lists else value for name, value in sample.items()}

    def lengths(self, start: int, stop: int) -> np.ndarray | None:
        """(stop - start,) int64 items of ``input_ids`` in each row, where they differ; None where there is no such."""
        return self._lengths_of(np.arange(start, stop))

    def _lengths_of(self, indices: np.ndarray) -> np.ndarray | None:
        for column in self._columns:
            if column.name == "input_ids" and column.is_ragged:
                return self._spans(column, *self._where(indices))[1]
        return None

    def undecoded(self) -> Undecoded | None:
        """See :meth:`Corpus.undecoded`; masks that are made are bytes."""
        return tokens_apart(self, [column.dtype for column in self._columns])

    def _rows(self, start: int, stop: int) -> dict[str, Tensor]:
        return self._taken(np.arange(start, stop))

    def _taken(self, indices: np.ndarray) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = {}
        where = self._where(indices)
        for column in self._columns:
            firsts, counts = self._spans(column, *where)
            longest = max(1, int(counts.max()))
            batch[column.name] = self._padded(column, firsts, counts, longest)
            if column.name == "input_ids" and self._makes_mask:
                mask = torch.arange(longest) < torch.from_numpy(counts)[:, None]
                batch["attention_mask"] = mask.to(torch.uint8 if self._as_stored else torch.int64)
        return batch

    @property
    def _makes_mask(self) -> bool:
        lists = [column.name for column in self._columns if not column.is_number]
        return "input_ids" in lists and "attention_mask" not in {column.name for column in self._columns}

    def _where(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The batch of the stream that each row is in, and which of its rows it is."""
        batches = np.searchsorted(self._starts, indices, "right") - 1
        return batches, indices - self._starts[batches]

    def _spans(self, column: Column, batches: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First item in the file, counted in the column's own dtype, and number of items of each row."""
        if not column.is_ragged:
            size = column.size if self.max_length is None else min(column.size, self.max_length)
            return column.values[batches] + rows * column.size, np.full(len(rows), size)
        (before, begins, ends, after), most = self._edges(column, batches, rows), column.counts[batches]
        wrong = (before < 0) | (begins < before) | (ends < begins) | (after < ends) | (after > most)
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            byte = int(column.offsets[batches[at]] + rows[at]) * column.edges.itemsize
            got = f"[{begins[at]}, {ends[at]}] between {before[at]} and {after[at]}"
            wanted = f"a list of {column.name!r} inside {most[at]} items"
            raise DamagedFile(f"{self._file.name}, byte {byte}: wanted {wanted}, got {got}")
        counts = ends - begins
        counts = counts if self.max_length is None else np.minimum(counts, self.max_length)
        return column.values[batches] + begins, counts

    def _edges(self, column: Column, batches: np.ndarray, rows: np.ndarray) -> Sequence[np.ndarray]:
        """Four (R,) int64: where the list before each begins, where it does and ends, and where the list after it ends.

        The ones beside it are for the check: lists that overlap are seen from either. Where there is none, its place
        is that of the batch's first item or of its end.
        """
        # Between the edges of two batches is the one where the first ends: only rows of one batch are neighbours.
        breaks = np.flatnonzero(np.diff(column.offsets[batches] + rows) != 1) + 1
        if not len(breaks):
            return self._edges_of_run(column, int(batches[0]), int(rows[0]), len(rows))
        if len(rows) < SHORT * (len(breaks) + 1):
            return self._gathered_edges(column, batches, rows)
        bounds = [0, *breaks.tolist(), len(rows)]
        runs = [(int(batches[k]), int(rows[k]), stop - k) for k, stop in pairwise(bounds)]
        if len(runs) * max(count for *_, count in runs) > WIDE * len(rows):
            return self._gathered_edges(column, batches, rows)
        return self._edges_of_runs(column, runs)

    def _edges_of_run(self, column: Column, *run: int) -> Sequence[np.ndarray]:
        """Of rows that follow each other, given as (batch, first row, rows), each edge read once."""
        first, stop = self._span_of_edges(*run)
        start = int(column.offsets[run[0]]) + first
        found = integers(self._items(column.edges), range(start, start + 1), stop - first).numpy()
        return self._around(column, run, first, found[0])

    def _edges_of_runs(self, column: Column, runs: list[tuple[int, int, int]]) -> Sequence[np.ndarray]:
        """Of several such runs, in one reading."""
        spans = np.array([self._span_of_edges(*run) for run in runs])
        starts = column.offsets[[batch for batch, *_ in runs]] + spans[:, 0]
        lengths = spans[:, 1] - spans[:, 0]
        found = integers(self._items(column.edges), starts, int(lengths.max()), lengths).numpy()
        each = zip(runs, spans[:, 0].tolist(), found, lengths, strict=True)
        lines = [self._around(column, run, first, read[:length]) for run, first, read, length in each]
        return [np.concatenate(parts) for parts in zip(*lines, strict=True)]

    def _around(self, column: Column, run: tuple[int, ...], first: int, found: np.ndarray) -> Sequence[np.ndarray]:
        """What :meth:`_edges` gives, of a run whose edges from the batch's ``first`` on were found."""
        batch, row, count = run
        line = np.zeros(count + 3, np.int64)
        line[-1] = column.counts[batch]
        line[first - row + 1 : first - row + 1 + len(found)] = found
        return line[:-3], line[1:-2], line[2:-1], line[3:]

    def _span_of_edges(self, batch: int, row: int, count: int) -> tuple[int, int]:
        """First and one past the last of a batch's edges that rows [row, row + count) and those beside them have."""
        return max(row - 1, 0), min(row + count + 1, int(self._starts[batch + 1] - self._starts[batch])) + 1

    def _gathered_edges(self, column: Column, batches: np.ndarray, rows: np.ndarray) -> Sequence[np.ndarray]:
        """Of rows anywhere, those of each by themselves."""
        firsts = np.maximum(rows - 1, 0)
        there = np.minimum(rows + 2, self._starts[batches + 1] - self._starts[batches]) - firsts + 1
        edges = integers(self._items(column.edges), column.offsets[batches] + firsts, 4, there).numpy()
        leading = rows == 0
        edges[leading, 1:], edges[leading, 0] = edges[leading, :3], 0
        beyond = np.arange(4) >= (there + leading)[:, None]
        return np.where(beyond, column.counts[batches][:, None], edges).T

    def _padded(self, column: Column, firsts: np.ndarray, counts: np.ndarray, longest: int) -> Tensor:
        items, starts = self._items(column.dtype), _stepping(firsts, int(counts[0]))
        fill = FILLER.get(column.name, 0)
        kept = column.dtype.kind == "f" or (self._as_stored and is_narrow(column.dtype, fill))
        read = as_stored if kept else integers
        rows = read(items, firsts, longest, counts, fill) if column.is_ragged else read(items, starts, longest)
        return rows.view(-1) if column.is_number else rows

    def _items(self, dtype: np.dtype) -> MappedArray:
        """The whole file as items of a dtype: what Arrow aligns, it aligns from a file's first byte on."""
        if dtype not in self._flat:
            self._flat[dtype] = MappedArray(self._file, 0, dtype, (self._file.size // dtype.itemsize,))
        return self._flat[dtype]

    def _files(self) -> list[MappedFile]:
        return [self._file]

    def _settings(self) -> dict[str, Any]:
        return {"columns": [column.name for column in self._columns], "max_length": self.max_length}

    def _notes(self) -> dict[str, Any]:
        counts = {f"items of {c.name}": int(c.counts.sum()) for c in self._columns if c.is_ragged}
        return {"batches": len(self._starts) - 1, **counts}

    def _like(self) -> Any:
        return tuple((column.name, column.shape) for column in self._columns)

    def _place(self, index: int) -> str:
        column = self._columns[0]
        first = self._spans(column, *self._where(np.array([index])))[0]
        return f"{self._file.name}, byte {int(first[0]) * column.dtype.itemsize}"


class SelectedCorpus(Corpus):
    """Rows of another corpus in the order of an indices file, which shuffling or selecting has left.

    Args:
        source: the rows.
        order: a corpus with a column ``indices`` of integers.
        transform: callable on each batch.

    Raises:
        DamagedFile: a column of something else.
    """

    format = "arrow"

    def __init__(self, source: Corpus, order: Corpus, transform: Callable[[Any], Any] | None = None):
        ((name, kind),) = order._like()
        if kind != "integers":
            raise DamagedFile(f"{order._paths()[0]}: wanted a column {name!r} of integers, got {kind}")
        super().__init__(len(order), transform)
        self._source, self._order = source, order

    def __getitem__(self, index: int) -> Any:
        """One row, as its own corpus shows it."""
        if self.transform is not None:
            return super().__getitem__(index)
        index = self._position(index)
        return self._source[int(self._indices(np.array([index]))[0])]

    def lengths(self, start: int, stop: int) -> np.ndarray | None:
        """(stop - start,) int64 tokens of each row, where they differ; None where all have one shape."""
        return self._source._lengths_of(self._indices(np.arange(start, stop)))

    def undecoded(self) -> Undecoded | None:
        """See :meth:`Corpus.undecoded`."""
        found = self._source.undecoded()
        if self.transform is not None or found is None:
            return None
        stored = copy.copy(self)
        stored._source = found.corpus
        return found._replace(corpus=stored)

    def _rows(self, start: int, stop: int) -> Any:
        return self._taken(np.arange(start, stop))

    def _taken(self, indices: np.ndarray) -> Any:
        return self._source.take(self._indices(indices))

    def _indices(self, places: np.ndarray) -> np.ndarray:
        found = self._order.take(places)["indices"].numpy()
        wrong = np.flatnonzero((found < 0) | (found >= len(self._source)))
        if len(wrong):
            place = self._order.locate(int(places[wrong[0]]))
            raise DamagedFile(f"{place}: wanted a row from 0 to {len(self._source) - 1}, got {found[wrong[0]]}")
        return found

    def _files(self) -> list[MappedFile]:
        return [*self._source._files(), *self._order._files()]

    def _settings(self) -> dict[str, Any]:
        return {**self._source._settings(), "selected": True}

    def _like(self) -> Any:
        return self._source._like()

    def _digest(self, hasher: Any) -> None:
        for part in (self._source, self._order):
            hasher.update(part.fingerprint.encode())

    def _paths(self) -> list[str]:
        return [*self._source._paths(), *self._order._paths()]

    def _place(self, index: int) -> str:
        return self._source.locate(int(self._indices(np.array([index]))[0]))


def _names(columns: Any) -> list[str] | None:
    if columns is None:
        return None
    if not isinstance(columns, (list, tuple)) or not columns or not all(isinstance(name, str) for name in columns):
        raise TypeError(f"columns: wanted a list of names, got {columns!r}")
    return list(dict.fromkeys(columns))


def _stepping(firsts: np.ndarray, count: int) -> Starts:
    """Starts that follow each other as a range, which is read as one piece."""
    first = int(firsts[0])
    follows = count > 0 and bool((np.diff(firsts) == count).all())
    return range(first, first + count * len(firsts), count) if follows else firsts
