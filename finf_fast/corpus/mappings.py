"""Arrays that the caller has mapped from a file for reading, looked at by calls that can fail politely.

A look at a mapping beyond the end that its file has by now kills the process. What ``numpy.load(path, mmap_mode="r")``
gives is therefore read from its file, as the formats' own arrays are; other mappings (``"r+"``, whose owner may write,
``"c"``, whose pages differ from the file's) stay as they are.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from torch import Tensor

from finf_fast.corpus.delivery import as_stored
from finf_fast.corpus.files import MappedArray, MappedFile

__all__ = ["MappedRows", "guarded"]


class MappedRows:
    """Rows of a file under the names that an array has for them; ``rows[a:b]`` and ``rows[indices]`` are tensors."""

    def __init__(self, mapped: MappedArray):
        self._mapped = mapped
        self.dtype, self.shape, self.ndim = mapped.dtype, mapped.shape, len(mapped.shape)
        self.nbytes = mapped.shape[0] * mapped.row_bytes

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> Tensor:
        items = self._mapped.row_items
        if isinstance(rows, slice):
            first, last, _ = rows.indices(len(self))
            starts: range | np.ndarray = range(first * items, max(first, last) * items, max(1, items))
            count = max(0, last - first)
        else:
            starts, count = np.asarray(rows) * items, len(rows)
        return as_stored(self._mapped, starts, items).view(count, *self.shape[1:])


def guarded(array: Any) -> Any:
    """``array``, or the rows of its file where it is mapped from one for reading, in C order and this byte order."""
    if not isinstance(array, np.memmap) or array.mode != "r" or not array.nbytes:
        return array
    if not (array.flags.c_contiguous and array.dtype.isnative):
        return array
    offset = _offset(array)
    if offset is None:
        return array
    try:
        file = MappedFile(array.filename)
    except (OSError, ValueError):  # the name is gone, or another's by now
        return array
    rows = MappedRows(MappedArray(file, offset, array.dtype, array.shape))
    return rows if _alike(rows, array, file.size) else array


def _offset(array: np.memmap) -> int | None:
    """The byte of its file that an array begins at; None where it is not all in the mapping that it came from."""
    if array.filename is None or array._mmap is None:
        return None
    begin = np.frombuffer(array._mmap, np.uint8).ctypes.data
    within = array.ctypes.data - begin
    if not 0 <= within <= len(array._mmap) - array.nbytes:
        return None
    return array.offset - array.offset % mmap.ALLOCATIONGRANULARITY + within


def _alike(rows: MappedRows, array: np.memmap, size: int) -> bool:
    """Whether the name still leads to the file that was mapped, as far as its size and two rows tell."""
    if array._mmap.size() != size:
        return False
    return all(rows[k : k + 1].numpy().tobytes() == array[k : k + 1].tobytes() for k in (0, len(rows) - 1))
