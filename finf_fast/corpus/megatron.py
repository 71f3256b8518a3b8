"""Megatron's, NeMo's and GPT-NeoX's indexed datasets: tokens in ``P.bin``, where each sequence lies in ``P.idx``.

Index, little-endian: 9 bytes of magic, u64 version 1, u8 dtype code, u64 sequences S, u64 documents D, then
int32 length (S) in tokens, int64 pointer (S) in bytes of the ``.bin``, int64 document (D): the sequence that each
document begins with, and S at the end; int8 mode (S) may follow.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from finf_fast.corpus.documents import DocumentCorpus
from finf_fast.corpus.files import MappedArray, MappedFile
from finf_fast.records import DamagedFile

__all__ = ["MegatronCorpus", "has_index"]

MAGIC = b"MMIDIDX\0\0"
HEADER = 34
# Two tools number the unsigned types differently under one magic: which of them wrote a file is told by its item size.
DTYPES = {
    (1, 1): "uint8", (2, 1): "int8", (3, 2): "int16", (4, 4): "int32", (5, 8): "int64", (8, 2): "uint16",
    (6, 2): "uint16", (7, 4): "uint32", (8, 8): "uint64",
}  # fmt: skip
PIECE = 1 << 16  # index rows looked at together on the way back to the last sequence that is not empty


class MegatronCorpus(DocumentCorpus):
    """Documents, or sequences, of a pair ``P.idx`` and ``P.bin``. Index rows are checked as they are read.

    Args:
        path: of either file, or P.
        sample: ``"document"``, all sequences of a document as one sample, or ``"sequence"``.
        max_length, transform: see :class:`DocumentCorpus`.

    Raises:
        FileNotFoundError: one of the two is missing.
        DamagedFile: a header, a size, a length or a pointer that cannot be true.
    """

    format = "megatron"

    def __init__(
        self,
        path: str | os.PathLike,
        sample: str | None = None,
        max_length: int | None = None,
        transform: Callable[[Any], Any] | None = None,
    ):
        if sample not in (None, "document", "sequence"):
            raise ValueError(f"sample: wanted 'document' or 'sequence', got {sample!r}")
        self.sample = sample or "document"
        index, data = (MappedFile(_beside(path, ending)) for ending in (".idx", ".bin"))
        self._index, code, sequences, documents = index, *_header(index)
        self._lengths = MappedArray(index, HEADER, np.dtype("<i4"), (sequences,))
        self._pointers = MappedArray(index, HEADER + 4 * sequences, np.dtype("<i8"), (sequences,))
        self._documents = MappedArray(index, HEADER + 12 * sequences, np.dtype("<i8"), (documents,))
        tokens = self._data(data, code)
        self._check_documents()
        samples = documents - 1 if self.sample == "document" else sequences
        super().__init__(tokens, samples, max_length, transform)

    def _spans(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        if self.sample == "sequence":
            return self._sequences(start, stop)
        bounds = self._bounds(start, stop)
        first, last = int(bounds[0]), int(bounds[-1])
        if first == last:
            return np.zeros(stop - start, np.int64), np.zeros(stop - start, np.int64)
        begins, counts = self._sequences(first, last)
        edges = np.append(begins, begins[-1] + counts[-1])[bounds - first]
        return edges[:-1], np.diff(edges)

    def _bounds(self, start: int, stop: int) -> np.ndarray:
        """(stop - start + 1,) sequences that documents ``[start, stop)`` begin with, and the last one ends at.

        Here and below a row on either side is looked at too: what overlaps with this piece is seen from it alone.
        """
        before, after = max(0, start - 1), min(stop + 2, self._documents.shape[0])
        bounds = self._documents.rows(before, after, _copied)
        wrong = np.flatnonzero((bounds[1:] < bounds[:-1]) | (bounds[:-1] < 0) | (bounds[1:] > self._lengths.shape[0]))
        if len(wrong):
            at = before + int(wrong[0]) + 1
            found = f"{int(bounds[wrong[0] + 1])} after {int(bounds[wrong[0]])}"
            raise DamagedFile(
                f"{self._documents.place(at)}: wanted documents that begin in order, got sequence {found}"
            )
        return bounds[start - before :][: stop - start + 1]

    def _sequences(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """First token and length of sequences ``[start, stop)``, each where the one before it ends."""
        item, stream = self._tokens.dtype.itemsize, self._tokens.shape[0]
        before, after = max(0, start - 1), min(stop + 1, self._lengths.shape[0])
        counts = self._lengths.rows(before, after, _copied)
        pointers = self._pointers.rows(before, after, _copied)
        begins, shift = pointers // item, pointers % item
        self._refuse(self._lengths, before, counts < 0, "a length of 0 or more", counts)
        inside = (pointers >= 0) & (shift == 0) & (begins + counts <= stream)
        self._refuse(self._pointers, before, ~inside, f"a whole token inside {stream * item} bytes", pointers)
        ends = np.append(begins[0] if before else 0, begins[:-1] + counts[:-1])
        self._refuse(self._pointers, before, begins != ends, "the end of the sequence before", pointers)
        own = slice(start - before, stop - before)
        return begins[own], counts[own]

    def _refuse(self, array: MappedArray, start: int, wrong: np.ndarray, wanted: str, found: np.ndarray) -> None:
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            raise DamagedFile(f"{array.place(start + at)}: wanted {wanted}, got {int(found[at])}")

    def _data(self, data: MappedFile, code: int) -> MappedArray:
        """The tokens, their dtype by the item size that the last sequence and the file's end leave."""
        last, length, pointer = self._last()
        size = (data.size - pointer) // length if pointer >= 0 else 0
        dtype = DTYPES.get((code, size))
        if dtype is None or pointer + length * size != data.size:
            raise DamagedFile(
                f"{data.name}: wanted a file that ends with sequence {last} ({length} tokens from byte {pointer}, "
                f"dtype code {code}), got {data.size} bytes"
            )
        return MappedArray(data, 0, np.dtype(dtype).newbyteorder("<"), (data.size // size,))

    def _last(self) -> tuple[int, int, int]:
        """Number, length and pointer of the last sequence that holds a token."""
        for stop in range(self._lengths.shape[0], 0, -PIECE):
            start = max(0, stop - PIECE)
            lengths = self._lengths.rows(start, stop, _copied)
            self._refuse(self._lengths, start, lengths < 0, "a length of 0 or more", lengths)
            if lengths.any():
                last = int(np.flatnonzero(lengths)[-1])
                pointer = self._pointers.rows(start + last, start + last + 1, _copied)
                return start + last, int(lengths[last]), int(pointer[0])
        raise ValueError(f"source: empty corpus, wanted a sequence with tokens in {self._index.name}, got none")

    def _check_documents(self) -> None:
        count, sequences = self._documents.shape[0], self._lengths.shape[0]
        ends = [int(self._documents.rows(at, at + 1, _copied)[0]) for at in (0, count - 1)]
        if ends != [0, sequences]:
            wanted = f"documents from sequence 0 to {sequences}"
            raise DamagedFile(f"{self._documents.place(0)}: wanted {wanted}, got {ends[0]} to {ends[1]}")

    @property
    def tokens(self) -> MappedArray:
        """The whole stream, in the dtype that index and size agree on."""
        return self._tokens

    def _settings(self) -> dict[str, Any]:
        return {"sample": self.sample, **super()._settings()}

    def _notes(self) -> dict[str, Any]:
        return {"sequences": self._lengths.shape[0], "documents": self._documents.shape[0] - 1, **super()._notes()}

    def _files(self) -> list[MappedFile]:
        return [self._index, *super()._files()]


def has_index(path: str | os.PathLike) -> bool:
    """Whether Megatron's index lies beside a file, or is it."""
    index = _beside(path, ".idx")
    return os.path.isfile(index) and MappedFile(index).head(6) == MAGIC[:6]


def _beside(path: str | os.PathLike, ending: str) -> str:
    name = os.fspath(path)
    return (name[:-4] if name.endswith((".idx", ".bin")) else name) + ending


def _copied(raw: np.ndarray) -> np.ndarray:
    """int64 of its own: the arrays of an index begin at odd places, where no pointer may be cast."""
    return raw.astype(np.int64)


def _header(index: MappedFile) -> tuple[int, int, int]:
    """dtype code, sequences and documents; the file is as long as they ask for."""
    head = index.head(HEADER)
    if not head.startswith(MAGIC) or len(head) < HEADER:
        raise DamagedFile(
            f"{index.name}, byte 0: wanted the magic {MAGIC!r} and a header of {HEADER} bytes, got {head!r}"
        )
    version, code = int.from_bytes(head[9:17], "little"), head[17]
    if version != 1:
        raise DamagedFile(f"{index.name}, byte 9: wanted version 1, got {version}")
    if code not in {known for known, _ in DTYPES}:
        raise DamagedFile(f"{index.name}, byte 17: wanted the code of an integer dtype, got {code}")
    sequences, documents = (int.from_bytes(head[at : at + 8], "little") for at in (18, 26))
    whole = HEADER + 12 * sequences + 8 * documents
    if index.size not in (whole, whole + sequences):
        wanted = f"{whole} bytes for {sequences} sequences and {documents} documents, or {sequences} more with modes"
        raise DamagedFile(f"{index.name}: wanted {wanted}, got {index.size}")
    if sequences < 1 or documents < 2:
        raise ValueError(f"source: empty corpus, wanted a document in {index.name}, got {sequences} sequences")
    return code, sequences, documents
