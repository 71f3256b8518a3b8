"""Many files of one format as one corpus: samples are counted through, file after file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from finf_fast.corpus.base import Corpus, tree_map
from finf_fast.corpus.collate import joined
from finf_fast.corpus.digest import SAMPLED, WHOLE
from finf_fast.corpus.files import MappedFile

__all__ = ["JoinedCorpus"]

SHOWN = 20  # paths named in a description; a corpus may have a hundred thousand
LOOKED_INTO = 64  # files of a large corpus whose content is in the fingerprint, 4 MiB of each: a third of a second


class JoinedCorpus(Corpus):
    """Corpora one after another. Files are opened, and their headers checked, before any work.

    At most 128 files are open at a time, in whatever order they are read. The fingerprint of what is 64 MiB or less
    covers every byte; beyond that it is made of every file's size and time of change, and of 64 files' content.

    Args:
        parts: of one format, in the order of their samples.
        transform: callable on each batch.

    Raises:
        ValueError: no parts, or parts whose samples do not make one batch.
    """

    format = "files"

    def __init__(self, parts: Sequence[Corpus], transform: Callable[[Any], Any] | None = None):
        formats = sorted({part.format for part in parts})
        if len(formats) != 1:
            raise ValueError(f"source: wanted files of one format, got {', '.join(formats) or 'no files'}")
        for part in parts:
            if part._like() != parts[0]._like():
                names = parts[0]._paths()[0], part._paths()[0]
                found = f"{parts[0]._like()} in {names[0]} and {part._like()} in {names[1]}"
                raise ValueError(f"source: wanted files with samples of one kind, got {found}")
        self._parts = list(parts)
        self._starts = np.cumsum([0, *map(len, parts)])
        super().__init__(int(self._starts[-1]), transform)

    def __getitem__(self, index: int) -> Any:
        """One sample, as the corpus of its file shows it."""
        if self.transform is not None:
            return super().__getitem__(index)
        index = self._position(index)
        ((part, own, _),) = self._pieces(index, index + 1)
        return part[own]

    def lengths(self, start: int, stop: int) -> np.ndarray | None:
        """(stop - start,) int64 tokens of each sample, where they differ; None where all have one shape."""
        found = [part.lengths(first, last) for part, first, last in self._pieces(start, stop)]
        return None if found[0] is None else np.concatenate(found)

    def _rows(self, start: int, stop: int) -> Any:
        return joined([part.read(first, last) for part, first, last in self._pieces(start, stop)])

    def _taken(self, indices: np.ndarray) -> Any:
        """File by file, each with its samples in their order; then back to the order asked for."""
        which = np.searchsorted(self._starts, indices, "right") - 1
        order = np.argsort(which, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(which[order])) + 1)
        files = [int(which[group[0]]) for group in groups]
        batch = joined([self._parts[k].take(indices[g] - self._starts[k]) for k, g in zip(files, groups, strict=True)])
        if len(groups) == 1:
            return batch
        places = np.argsort(order)
        return tree_map(lambda rows: rows[places], batch)

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
        files = self._files()
        if sum(file.size for file in files) <= WHOLE:
            for part in self._parts:
                hasher.update(part.fingerprint.encode())
            return
        for part in self._parts:
            hasher.update(json.dumps(part._identity(), sort_keys=True).encode())
        for file in files:
            hasher.update(f"file {file.size} changed {file.changed_ns}".encode())
        for k in sorted({k * (len(files) - 1) // (LOOKED_INTO - 1) for k in range(LOOKED_INTO)}):
            files[k].digest(hasher, whole=SAMPLED)

    def _files(self) -> list[MappedFile]:
        return [file for part in self._parts for file in part._files()]

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

    def _like(self) -> Any:
        return self._parts[0]._like()

    def _place(self, index: int) -> str:
        ((part, own, _),) = self._pieces(index, index + 1)
        return part.locate(own)
