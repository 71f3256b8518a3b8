"""Many files of one format as one corpus: samples are counted through, file after file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from glob import glob
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from finf_fast.corpus.base import Corpus

__all__ = ["JoinedCorpus", "paths_of"]

SHOWN = 20  # paths named in a description; a corpus may have a hundred thousand
FILLER = {"labels": -100}  # as in collate.py


class JoinedCorpus(Corpus):
    """Corpora one after another. Files are opened, and their headers checked, before any work.

    Args:
        parts: of one format, in the order of their samples.
        transform: callable on each batch.

    Raises:
        ValueError: no parts, or parts of several formats.
    """

    format = "files"

    def __init__(self, parts: Sequence[Corpus], transform: Callable[[Any], Any] | None = None):
        formats = sorted({part.format for part in parts})
        if len(formats) != 1:
            raise ValueError(f"source: wanted files of one format, got {', '.join(formats) or 'no files'}")
        self._parts = list(parts)
        self._starts = np.cumsum([0, *map(len, parts)])
        super().__init__(int(self._starts[-1]), transform)

    def lengths(self, start: int, stop: int) -> np.ndarray | None:
        """(stop - start,) int64 tokens of each sample, where they differ; None where all have one shape."""
        found = [part.lengths(first, last) for part, first, last in self._pieces(start, stop)]
        return None if found[0] is None else np.concatenate(found)

    def _rows(self, start: int, stop: int) -> Any:
        return _joined([part.read(first, last) for part, first, last in self._pieces(start, stop)])

    def _pieces(self, start: int, stop: int) -> list[tuple[Corpus, int, int]]:
        """The parts that hold samples ``[start, stop)``, and which of their own those are."""
        first = int(np.searchsorted(self._starts, start, "right")) - 1
        pieces = []
        while start < stop:
            begin, end = int(self._starts[first]), int(self._starts[first + 1])
            pieces.append((self._parts[first], start - begin, min(stop, end) - begin))
            start, first = min(stop, end), first + 1
        return pieces

    def _digest(self, hasher: Any) -> None:
        for part in self._parts:
            hasher.update(part.fingerprint.encode())

    def _settings(self) -> dict[str, Any]:
        return {"of": self._parts[0].format, "files": len(self._parts)}

    def _notes(self) -> dict[str, Any]:
        """Numbers add up over the files; what else a part has to say is said by the first."""
        each = [part._notes() for part in self._parts]
        return {key: sum(notes[key] for notes in each) if isinstance(first, int) else first
                for key, first in each[0].items()}  # fmt: skip

    def _paths(self) -> list[str]:
        names = [name for part in self._parts[:SHOWN] for name in part._paths()]
        return names if len(self._parts) <= SHOWN else [*names, f"... ({len(self._parts)} files in all)"]

    def _place(self, index: int) -> str:
        ((part, own, _),) = self._pieces(index, index + 1)
        return part.locate(own)


def paths_of(source: Any) -> list[str] | None:
    """The files that a list of paths or a pattern stands for, a pattern's in the order of their names; else None.

    Raises:
        FileNotFoundError: a pattern that no file fits.
    """
    if isinstance(source, list) and source and all(isinstance(path, (str, os.PathLike)) for path in source):
        return list(map(os.fspath, source))
    if isinstance(source, (str, os.PathLike)) and not os.path.exists(source) and set(os.fspath(source)) & set("*?["):
        found = sorted(glob(os.fspath(source), recursive=True))
        if not found:
            raise FileNotFoundError(f"source: no file fits the pattern {os.fspath(source)!r}")
        return found
    return None


def _joined(batches: list[Any]) -> Any:
    first = batches[0]
    if len(batches) == 1:
        return first
    if isinstance(first, Mapping):
        return {key: _rows_joined([batch[key] for batch in batches], FILLER.get(key, 0)) for key in first}
    if isinstance(first, tuple):
        return tuple(map(torch.cat, zip(*batches, strict=True)))
    return torch.cat(batches)


def _rows_joined(rows: list[torch.Tensor], filler: int) -> torch.Tensor:
    """(B_i, L_i) one below the other, padded right to the longest."""
    longest = max(part.shape[-1] for part in rows)
    padded = [F.pad(part, (0, longest - part.shape[-1]), value=filler) if part.dim() > 1 else part for part in rows]
    return torch.cat(padded)
