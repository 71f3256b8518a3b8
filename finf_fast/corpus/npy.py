"""numpy `.npy` files: features, and integer labels in a file of their own; mapped, never loaded."""

from __future__ import annotations

import io
import math
import os
from typing import Any

import numpy as np

from finf_fast.corpus.files import MappedArray, MappedFile
from finf_fast.corpus.pixels import Pixels
from finf_fast.corpus.rowfiles import RowFileCorpus
from finf_fast.records import DamagedFile

__all__ = ["MAGIC", "NpyCorpus", "map_npy", "require_countable"]

MAGIC = b"\x93NUMPY"
COUNTABLE = 2**60  # items of eight bytes
HEAD = 12 + 10_000  # magic, version, length; then the longest header text that numpy itself agrees to parse


class NpyCorpus(RowFileCorpus):
    """``features.npy`` (S, …): uint8 pixels or floats, with ``labels`` a path or an array of (S,) integers.

    Args:
        path: the features.
        labels: a path to a ``.npy`` or IDX file already mapped by the caller, an array, or None.
        mean, std, layout, dtype: see :class:`Pixels`.
        transform: callable on each batch.

    Raises:
        DamagedFile: not an ``.npy`` file, or its size is not what the header promises.
        ValueError: Fortran order, objects, records or complex numbers.
    """

    format = "npy"

    def __init__(self, path: Any, labels: Any = None, mean=None, std=None, layout=None, dtype=None, transform=None):
        features = map_npy(path)
        super().__init__(features, labels, Pixels(features.shape, features.dtype, mean, std, layout, dtype), transform)


def map_npy(path: str | os.PathLike) -> MappedArray:
    """Map an ``.npy`` file after checking header and size (numpy's format, versions 1.0 and 2.0).

    Raises:
        DamagedFile: wrong magic, a header that cannot be read, a file shorter or longer than the header says.
        ValueError: a dtype or memory order that rows cannot be read from.
    """
    file = MappedFile(path)
    shape, fortran, dtype, offset = _header(file)
    if dtype.hasobject or dtype.kind not in "fiub" or dtype.itemsize > 8:
        raise ValueError(f"source: wanted floats, integers or bools in {file.name}, got dtype {dtype}")
    if not shape:
        raise ValueError(f"source: wanted samples along a first dimension in {file.name}, got a single number")
    if fortran and len(shape) > 1:
        wanted = "C order (numpy.save of numpy.ascontiguousarray)"
        raise ValueError(
            f"source: wanted {wanted} in {file.name}, got Fortran order, where a sample is not in one piece"
        )
    array = MappedArray(file, offset, dtype, shape)
    array.require_whole()
    require_countable(array)
    return array


def require_countable(array: MappedArray) -> None:
    """Check lengths that no size vouches for: beside a 0, any others promise a file of nothing.

    Raises:
        DamagedFile: a batch of such rows would have strides that no tensor can.
    """
    if math.prod(length or 1 for length in array.shape) >= COUNTABLE:
        wanted = f"lengths with a product below {COUNTABLE}, zeros apart"
        raise DamagedFile(f"{array.file.name}, its header: wanted {wanted}, got the shape {array.shape}")


def _header(file: MappedFile) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    text = io.BytesIO(file.head(HEAD))
    if not text.getvalue().startswith(MAGIC):
        hint = "raw tokens under such a name open with window and dtype"
        raise DamagedFile(f"{file.name}, byte 0: wanted the magic {MAGIC!r}, got {text.getvalue()[:6]!r}; {hint}")
    try:
        version = np.lib.format.read_magic(text)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"wanted format version 1.0 or 2.0, got {version[0]}.{version[1]}")
        shape, fortran, dtype = readers[version](text)
    except Exception as error:  # whatever the parser stumbles over, the header is what is wrong
        raise DamagedFile(f"{file.name}, byte 6: header of .npy cannot be read: {error}") from error
    if min(shape, default=0) < 0:
        raise DamagedFile(f"{file.name}, byte 10: wanted lengths of 0 or more, got the shape {shape}")
    return shape, fortran, dtype, text.tell()
