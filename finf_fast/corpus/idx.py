"""IDX files, the MNIST family: big-endian headers, also gzipped, which are unpacked once into a cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from finf_fast.corpus.files import MappedArray, MappedFile
from finf_fast.corpus.npy import require_countable
from finf_fast.corpus.pixels import Pixels
from finf_fast.corpus.rowfiles import RowFileCorpus
from finf_fast.corpus.unpack import is_gzip, unpacked
from finf_fast.records import DamagedFile

__all__ = ["IdxCorpus", "find_idx_pair", "is_idx", "is_mnist", "map_idx"]

# The third byte of the magic; the first two are 0 and the fourth is the number of dimensions.
DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


class IdxCorpus(RowFileCorpus):
    """Images (S, H, W) uint8, delivered float32 (S, 1, H, W) in [0, 1]; other arrays as :class:`Pixels` says.

    Args:
        path: the images, or a directory that holds the training images and labels under the names of MNIST.
        labels: labels mapped by the caller, an array, or None (a directory brings its own).
        mean, std, layout, dtype: see :class:`Pixels`; three dimensions mean ``layout="NHW"`` unless another is named.
        cache: folder for unpacked files; default ``$XDG_CACHE_HOME/finf_fast``, or ``~/.cache/finf_fast``.
        transform: callable on each batch.

    Raises:
        DamagedFile: not an IDX file, a size that is not what the header promises, or a broken archive.
        FileNotFoundError: a directory without the training pair.
    """

    format = "idx"

    def __init__(
        self, path: Any, labels: Any = None, mean=None, std=None, layout=None, dtype=None, cache=None, transform=None
    ):
        if os.path.isdir(path):
            path, beside = find_idx_pair(path)
            labels = map_idx(beside, cache) if labels is None else labels
        features = map_idx(path, cache)
        if layout is None and len(features.shape) == 3:
            layout = "NHW"
        super().__init__(features, labels, Pixels(features.shape, features.dtype, mean, std, layout, dtype), transform)


def is_idx(head: bytes) -> bool:
    """Whether a file's first four bytes are an IDX magic."""
    return len(head) == 4 and head[:2] == b"\0\0" and head[2] in DTYPES and head[3] > 0


def map_idx(path: str | os.PathLike, cache: str | os.PathLike | None = None) -> MappedArray:
    """Map an IDX file, or the unpacked copy of a gzipped one, after checking header and size.

    Raises:
        DamagedFile: wrong magic, or a file shorter or longer than the header says.
    """
    file = MappedFile(path)
    if not is_gzip(file.head(4)):
        return _mapped(file)
    copy = unpacked(file, cache)
    try:
        return _mapped(MappedFile(copy, file.name))
    except DamagedFile:  # which of the two is damaged, the archive or what the cache has kept of it?
        return _mapped(MappedFile(unpacked(file, cache, anew=True), file.name))


def _mapped(file: MappedFile) -> MappedArray:
    head = file.head(4)
    if not is_idx(head):
        raise DamagedFile(f"{file.name}, byte 0: wanted an IDX magic (00 00 type dimensions), got {head.hex(' ')!r}")
    lengths = file.head(4 + 4 * head[3])[4:]
    if len(lengths) < 4 * head[3]:
        raise DamagedFile(f"{file.name}, byte 4: wanted {head[3]} lengths of 4 bytes, got a file of {file.size} bytes")
    shape = tuple(int(n) for n in np.frombuffer(lengths, ">u4"))
    array = MappedArray(file, 4 + len(lengths), np.dtype(DTYPES[head[2]]), shape)
    array.require_whole()
    require_countable(array)
    return array


def is_mnist(folder: str | os.PathLike) -> bool:
    """Whether a folder holds something of MNIST's training pair."""
    return any(Path(folder, name + end).is_file() for name in (IMAGES, LABELS) for end in ("", ".gz"))


def find_idx_pair(folder: str | os.PathLike) -> tuple[Path, Path]:
    """Training images and labels in a folder, plain or gzipped.

    Raises:
        FileNotFoundError: one of the two is not there.
    """
    return _find(folder, IMAGES), _find(folder, LABELS)


def _find(folder: str | os.PathLike, name: str) -> Path:
    for candidate in (Path(folder, name), Path(folder, name + ".gz")):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"source: wanted {name} or {name}.gz in the folder {os.fspath(folder)!r}, got neither")
