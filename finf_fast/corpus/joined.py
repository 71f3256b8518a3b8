"""Many files of one format as one corpus: samples are counted through, file after file."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from finf_fast.corpus.base import Corpus, tree_map
from finf_fast.corpus.collate import joined
from finf_fast.corpus.digest import SAMPLED, WHOLE
from finf_fast.corpus.files import MappedFile
from finf_fast.corpus.undecoded import Undecoded
from finf_fast.runs import gathered

__all__ = ["JoinedCorpus"]

SHOWN = 20  # paths named in a description; a corpus may have a hundred thousand
LOOKED_INTO = 64  # files of a large corpus of which the fingerprint has 4 MiB of content each: a third of a second
# Files of which it has a piece, so that shards of one size and time, as an archive leaves them, are told apart.
GLANCED_AT, GLANCE = 10_000, 4 << 10


class JoinedCorpus(Corpus):
    """Corpora one after another. Files are opened, and their headers checked, before any work.

    At most 128 files are open at a time, in whatever order they are read. The fingerprint of what is 64 MiB or less
    covers every byte; beyond that it is made of every file's size and time of change, a piece of each (of 10,000 at
    most), and more of the content of 64.

    Args:
        parts: of one format, in the order of their samples.
        transform: callable on each batch.
        short: names and tokens of files that were left out, for they hold no sample.

    Raises:
        ValueError: no parts, or parts whose samples do not make one batch.
    """

    format = "files"

    def __init__(
        self,
        parts: Sequence[Corpus],
        transform: Callable[[Any], Any] | None = None,
        short: Sequence[tuple[str, int]] = (),
    ):
        self._short = [*short, *(file for part in parts if _is_joined(part) for file in part._short)]
        parts = [one for part in parts for one in (part._parts if _is_joined(part) else [part])]
        formats = sorted({part.format for part in parts})
        if len(formats) != 1:
            raise ValueError(f"source: wanted files of one format, got {', '.join(formats) or 'no files'}")
        for part in parts:
            if part._like() != parts[0]._like():
                names = parts[0]._paths()[0], part._paths()[0]
                found = f"{parts[0]._like()} in {names[0]} and {part._like()} in {names[1]}"
                raise ValueError(f"source: wanted files with samples of one kind, got {found}")
        self._parts = parts
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

    def undecoded(self) -> Undecoded | None:
        """See :meth:`Corpus.undecoded`; all files have to be decoded alike."""
        found = [part.undecoded() for part in self._parts]
        first = found[0]
        if self.transform is not None or any(one is None or one.alike != first.alike for one in found):
            return None
        stored = copy.copy(self)
        stored._parts = [one.corpus for one in found]
        return first._replace(corpus=stored)

    def _rows(self, start: int, stop: int) -> Any:
        return joined([part.read(first, last) for part, first, last in self._pieces(start, stop)])

    def _taken(self, indices: np.ndarray) -> Any:
        """File by file, each with its samples in their order; then back to the order asked for."""
        found, places = self._by_file(indices, Corpus.take)
        batch = joined(found)
        return batch if len(found) == 1 else tree_map(lambda rows: gathered(rows, places), batch)

    def _lengths_of(self, indices: np.ndarray) -> np.ndarray | None:
        found, places = self._by_file(indices, lambda part, own: part._lengths_of(own))
        return None if found[0] is None else np.concatenate(found)[places]

    def _by_file(self, indices: np.ndarray, look: Callable[[Corpus, np.ndarray], Any]) -> tuple[list[Any], np.ndarray]:
        """What each file has to say on its own of the samples, and where each sample is in all that."""
        which = np.searchsorted(self._starts, indices, "right") - 1
        order = np.argsort(which, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(which[order])) + 1)
        found = [look(self._parts[k], indices[g] - self._starts[k]) for g in groups for k in which[g[:1]]]
        return found, np.argsort(order)

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
        for held in (held for part in self._parts for held in part._memory()):
            hasher.update(held.fingerprint.encode())
        for file in files:
            hasher.update(f"file {file.size} changed {file.changed_ns}".encode())
        for k in _evenly(len(files), LOOKED_INTO):
            files[k].digest(hasher, whole=SAMPLED)
        for k in _evenly(len(files), GLANCED_AT):
            hasher.update(files[k].middle(GLANCE))

    def _files(self) -> list[MappedFile]:
        """Of every part, each once: of labels that count through all parts, each has the one file."""
        return list(dict.fromkeys(file for part in self._parts for file in part._files()))

    def _settings(self) -> dict[str, Any]:
        each = [part._settings() for part in self._parts]
        common = {name: value for name, value in each[0].items() if all(one.get(name) == value for one in each)}
        return {**common, "of": self._parts[0].format, "files": len(self._parts)}

    def _notes(self) -> dict[str, Any]:
        """Numbers add up over the files; what else a part has to say is said by the first."""
        each = [part._notes() for part in self._parts]
        notes = {key: sum(notes[key] for notes in each) if isinstance(first, int) else first
                 for key, first in each[0].items()}  # fmt: skip
        if not self._short:
            return notes
        more, names = sum(tokens for _, tokens in self._short), [name for name, _ in self._short]
        notes |= {key: notes[key] + more for key in ("tokens", "tokens_dropped_at_tail")}
        shown = names if len(names) <= SHOWN else [*names[:SHOWN], f"... ({len(names)} files in all)"]
        return {**notes, "files_without_window": shown}

    def _paths(self) -> list[str]:
        names = [name for part in self._parts[:SHOWN] for name in part._paths()]
        return names if len(self._parts) <= SHOWN else [*names, f"... ({len(self._parts)} files in all)"]

    def _like(self) -> Any:
        return self._parts[0]._like()

    def _place(self, index: int) -> str:
        ((part, own, _),) = self._pieces(index, index + 1)
        return part.locate(own)


def _evenly(count: int, most: int) -> list[int]:
    """All of so many places, or the most that there may be, the first and the last among them."""
    return list(range(count)) if count <= most else sorted({k * (count - 1) // (most - 1) for k in range(most)})


def _is_joined(part: Corpus) -> bool:
    """Whether a part is several files itself, as a saved dataset in shards is, and nothing else."""
    return isinstance(part, JoinedCorpus) and part.transform is None
