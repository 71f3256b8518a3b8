"""Flat token files: one stream of uint16 or uint32 tokens, cut into windows of length L every ``stride`` tokens.

Known headers: none (nanoGPT), llm.c version 1 and 7, and `.npy` of one dimension. A file may be of any size: offsets
are Python integers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from finf_fast.corpus.base import Corpus
from finf_fast.corpus.delivery import Starts, as_stored, integers
from finf_fast.corpus.files import MappedArray, MappedFile
from finf_fast.corpus.megatron import MegatronCorpus, has_index
from finf_fast.corpus.npy import MAGIC as NPY_MAGIC
from finf_fast.corpus.npy import map_npy
from finf_fast.corpus.undecoded import Undecoded, tokens_apart
from finf_fast.corpus.unpack import is_gzip
from finf_fast.records import DamagedFile

__all__ = ["NoWindow", "TokenCorpus", "is_llmc"]

# llm.c: 256 int32, of which [0] the magic, [1] the version, [2] the number of tokens.
LLMC_HEADER = 1024
LLMC = {20240520: (1, "uint16"), 20240801: (7, "uint32")}
DTYPES = ("uint16", "uint32")

# What tells uint32 tokens that are read as uint16: every second number, the upper half of a token, is small, while of
# the others most are not. Upper halves stay below 16 up to a vocabulary of a million. In text as uint16 both places are
# alike, so that of 64 pairs half would have to differ by chance: 2⁻⁶⁴.
SPOTS, SPOT_BYTES = 4, 2048
UPPER, PAIRS = 16, 64
MOST = 2**60  # tokens of eight bytes, beyond which a place in a file is no int64


class NoWindow(ValueError):
    """Files with fewer tokens than a window: no corpus by themselves, and beside others no samples.

    Attributes:
        files: (name, tokens) of each.
    """

    def __init__(self, message: str, files: list[tuple[str, int]]):
        super().__init__(message)
        self.files = files


class TokenCorpus(Corpus):
    """Windows of a token stream; sample i holds tokens ``[i·stride, i·stride + window)``.

    Batches are (B, L) int64 ids, as stored: whether the model's vocabulary holds them is checked at the loss.

    Args:
        path: the file.
        window: tokens a sample, L.
        stride: tokens from one sample's start to the next; default L. A last piece too short for a window is dropped,
            and :meth:`describe` says how many tokens that is.
        dtype: ``"uint16"`` or ``"uint32"`` where no header says; default uint16 for a name that ends in ``.bin``, or
            what Megatron's index beside it says. A file that looks like uint32 is then refused until one is named.
        header: bytes to skip before the first token, instead of looking for a known header.
        transform: callable on each batch.

    Raises:
        DamagedFile: the size is not what the header promises, or the file ends inside a token.
        NoWindow: the file holds no window.
        ValueError, TypeError: settings that do not fit the file, or a file that is packed.
    """

    format = "tokens"
    _as_stored = False

    def __init__(
        self,
        path: str | os.PathLike,
        window: int | None = None,
        stride: int | None = None,
        dtype: str | None = None,
        header: int | None = None,
        transform: Callable[[Any], Any] | None = None,
    ):
        self._tokens = _map_tokens(path, dtype, header)
        count, name = self._tokens.shape[0], self._tokens.file.name
        if window is None:
            raise ValueError(f"window: wanted the tokens a sample for {name}, got None")
        self.window = _positive("window", window)
        self.stride = self.window if stride is None else _positive("stride", stride)
        if self.window > count:
            raise NoWindow(f"window: wanted at most {count} (the tokens in {name}), got {window}", [(name, count)])
        super().__init__(1 + (count - self.window) // self.stride, transform)

    def undecoded(self) -> Undecoded | None:
        """See :meth:`Corpus.undecoded`."""
        return tokens_apart(self, [self._tokens.dtype])

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        return self._windows(range(start * self.stride, stop * self.stride, self.stride))

    def _taken(self, indices: np.ndarray) -> torch.Tensor:
        return self._windows(indices * self.stride)

    def _windows(self, starts: Starts) -> torch.Tensor:
        return (as_stored if self._as_stored else integers)(self._tokens, starts, self.window)

    def _files(self) -> list[MappedFile]:
        return [self._tokens.file]

    def _settings(self) -> dict[str, Any]:
        stored = {"stored_dtype": self._tokens.dtype.name, "header": self._tokens.offset}
        return {"window": self.window, "stride": self.stride, **stored}

    def _notes(self) -> dict[str, Any]:
        count = self._tokens.shape[0]
        covered = (len(self) - 1) * self.stride + self.window
        between = max(0, self.stride - self.window) * (len(self) - 1)
        return {"tokens": count, "tokens_dropped_at_tail": count - covered, "tokens_skipped_between": between}

    def _place(self, index: int) -> str:
        return self._tokens.place(index * self.stride)


def is_llmc(head: bytes) -> bool:
    """Whether a file's first four bytes are the magic of an llm.c token file."""
    return len(head) >= 4 and int.from_bytes(head[:4], "little") in LLMC


def _map_tokens(path: str | os.PathLike, dtype: str | None, header: int | None) -> MappedArray:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: wanted one of {DTYPES}, got {dtype!r}")
    file = MappedFile(path)
    head = file.head(12)
    if file.path.endswith(".gz") and is_gzip(head):
        raise ValueError(f"source: wanted tokens as they are, got {file.name}, which is gzipped: unpack it first")
    if header is not None:
        return _headerless(file, dtype, header)
    if dtype is None and file.path.endswith(".bin") and has_index(path):
        return MegatronCorpus(path).tokens
    if head.startswith(NPY_MAGIC):
        return _npy_tokens(path, dtype)
    return _llmc_tokens(file, head, dtype) if is_llmc(head) else _headerless(file, dtype, 0)


def _headerless(file: MappedFile, dtype: str | None, header: int) -> MappedArray:
    if isinstance(header, bool) or not isinstance(header, int) or header < 0:
        raise ValueError(f"header: wanted a number of bytes to skip, 0 or more, got {header!r}")
    if dtype is None and not file.name.endswith(".bin"):
        raise ValueError(f"dtype: wanted one of {DTYPES}, which {file.name} does not tell, got None")
    item = np.dtype(dtype or "uint16").newbyteorder("<")
    payload = file.size - header
    if payload < item.itemsize:
        said = f"source: empty corpus, wanted tokens after byte {header} of {file.name}, got {file.size} bytes"
        raise NoWindow(said, [(file.name, 0)]) if payload == 0 else ValueError(said)
    if payload % item.itemsize:
        where = f"it ends inside the token at byte {file.size - payload % item.itemsize}"
        raise DamagedFile(f"{file.name}: wanted whole {item.name} tokens, got {payload} bytes of them: {where}")
    if dtype is None:
        _refuse_halves(file, header)
    return MappedArray(file, header, item, (payload // item.itemsize,))


def _refuse_halves(file: MappedFile, header: int) -> None:
    """Refuses numbers that look like parts of uint32 or int64, by a look at some places of the file."""
    tokens = (file.size - header) // 4
    if (file.size - header) % 4 or tokens < PAIRS:
        return
    count = min(tokens, SPOT_BYTES // 4)
    firsts = {header + 8 * (k * (tokens - count) // (SPOTS - 1) // 2) for k in range(SPOTS)}
    lower, upper = _halves(file, sorted(firsts), 4 * count)
    if not (upper.any() or lower[1::2].any()) and lower.astype(bool).mean() > 0.25:
        cure = "save them with .astype('uint16'), or as .npy, or give dtype='uint16'"
        raise ValueError(
            f"source: wanted tokens of two or four bytes in {file.name}, got what looks like int64: {cure}"
        )
    if upper.max() < UPPER and (lower > upper.max()).mean() > 0.5:
        seen = f"every second uint16 of {len(lower)} pairs is at most {upper.max()}, as the upper halves of uint32 are"
        raise ValueError(f"dtype: wanted 'uint32', or 'uint16' all the same, for {file.name}: {seen}; got None")


def _halves(file: MappedFile, firsts: list[int], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers at even and at odd places of so many bytes from each of some bytes on."""
    found = []
    for first in firsts:
        with file.view(first, first + count) as raw:
            found.append(raw.view("<u2").reshape(-1, 2))
    return tuple(np.concatenate(found).T)


def _llmc_tokens(file: MappedFile, head: bytes, dtype: str | None) -> MappedArray:
    magic, version, count = (int(word) for word in np.frombuffer(head.ljust(12, b"\0"), "<i4"))
    wanted, stored = LLMC[magic]
    if version != wanted:
        raise DamagedFile(f"{file.name}, byte 4: wanted version {wanted} after the magic {magic}, got {version}")
    if count < 0:
        raise DamagedFile(f"{file.name}, byte 8: wanted a number of tokens, got {count}")
    _require_dtype(file.name, dtype, stored)
    array = MappedArray(file, LLMC_HEADER, np.dtype(stored).newbyteorder("<"), (count,))
    array.require_whole()
    return array


def _npy_tokens(path: str | os.PathLike, dtype: str | None) -> MappedArray:
    array = map_npy(path)
    if len(array.shape) != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"source: wanted one dimension of integers as tokens, got {array.dtype} {array.shape}")
    _require_dtype(array.file.name, dtype, array.dtype.name)
    return array


def _require_dtype(name: str, dtype: str | None, stored: str) -> None:
    if dtype is not None and dtype != stored:
        raise ValueError(f"dtype: wanted {stored!r} or None, for the header of {name} says so, got {dtype!r}")


def _positive(argument: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{argument}: wanted an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{argument}: wanted 1 or more, got {value}")
    if value >= MOST:
        raise ValueError(f"{argument}: wanted fewer tokens than {MOST}, which no file holds, got {value}")
    return int(value)
