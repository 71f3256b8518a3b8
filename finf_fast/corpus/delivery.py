"""Runs of items in a file to one batch, in one pass of the compiled loops: read, converted and padded on the way.

A run begins at any item; runs may overlap, repeat and come in any order. Where the items are of a kind that the loops
do not take (foreign byte order, uint64), or the compiled module is missing, numpy does the same, run by run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finf_fast.corpus.compiled import compiled
from finf_fast.corpus.files import MappedArray
from finf_fast.corpus.widen import integers as widened
from finf_fast.records import DamagedFile

__all__ = ["Shades", "Starts", "as_stored", "integers", "shaded"]

STORED = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "i8": 6}  # finf::Stored
HIGHEST = np.iinfo(np.int64).max
Starts = range | np.ndarray


@dataclass(frozen=True)
class Shades:
    """What stands for a pixel's 256 values, channel by channel.

    Attributes:
        table: (C, 256) of what is delivered, float32 or bfloat16.
        run: pixels of one channel that lie side by side: H·W in planes, 1 where the channels take turns.
        mean, std: (C,) float32: the table is ``(x / 255 - mean) / std``, each step rounded to float32.
    """

    table: Tensor
    run: int
    mean: Tensor
    std: Tensor

    @property
    def compiled(self) -> Any:
        """The same for the compiled loops, which have a copy. Kept without a lock, as functools has one until Python
        3.12: a child forked meanwhile would find it held."""
        found = self.__dict__.get("_compiled")
        if found is None:
            table, place = self.table, (self.mean.data_ptr(), self.std.data_ptr())
            found = compiled().Shades(table.data_ptr(), table.itemsize, len(table), self.run, *place)
            self.__dict__["_compiled"] = found
        return found

    def __reduce__(self):
        # As arrays: torch moves a tensor that multiprocessing pickles to other memory, from under a thread that reads.
        table = self.table.view(torch.uint8).numpy()
        return _shades, (table, self.table.dtype, self.run, self.mean.numpy(), self.std.numpy())


def _shades(table: np.ndarray, dtype: torch.dtype, run: int, mean: np.ndarray, std: np.ndarray) -> Shades:
    return Shades(torch.from_numpy(table).view(dtype), run, torch.from_numpy(mean), torch.from_numpy(std))


def integers(
    array: MappedArray, starts: Starts, length: int, lengths: Sequence[int] | np.ndarray | None = None, fill: int = 0
) -> Tensor:
    """Runs of integers as (B, length) int64.

    Args:
        array: of any integer dtype; its items count from 0, whatever its shape.
        starts: the item that each of the B runs begins at: (B,) integers, or a range that steps upward.
        length: items a run.
        lengths: (B,) items of each run, at most ``length``, where they differ; the rest is ``fill``.

    Raises:
        DamagedFile: the file no longer holds them, or holds a uint64 that int64 cannot.
    """
    lengths = None if lengths is None else np.ascontiguousarray(lengths, np.int64)
    out = array.file.reading.slots.empty((len(starts), length), torch.int64)
    code = STORED.get(array.dtype.str[1:]) if _is_compiled(array) else None
    if code is None:
        return _one_by_one(array, starts, length, lengths, out.fill_(fill), widened)
    if not _delivered("deliver_integers", array, starts, length, lengths, code, fill, out.data_ptr()):
        out.fill_(fill)
    return out


def as_stored(
    array: MappedArray, starts: Starts, length: int, lengths: Sequence[int] | np.ndarray | None = None, fill: int = 0
) -> Tensor:
    """Runs of numbers as (B, length) of their own dtype, in this machine's byte order.

    Args, Raises:
        as :func:`integers`; ``lengths`` that differ are of integers, whose dtype holds ``fill``.
    """
    lengths = None if lengths is None else np.ascontiguousarray(lengths, np.int64)
    plain = torch.from_numpy(np.empty(0, array.dtype.newbyteorder("="))).dtype
    out = array.file.reading.slots.empty((len(starts), length), plain)
    if not _is_compiled(array):
        return _one_by_one(array, starts, length, lengths, out.fill_(fill), _native)
    if not _delivered("deliver_raw", array, starts, length, lengths, array.dtype.itemsize, fill, out.data_ptr()):
        out.fill_(fill)
    return out


def shaded(
    array: MappedArray,
    starts: Starts,
    shades: Shades,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
) -> Tensor:
    """Runs of uint8 pixels as (B, *shape) of the dtype and the numbers that ``shades`` gives them.

    Args:
        strides: of ``shape``, where its dimensions are stored in another order; None where they lie as they are.
    """
    length = math.prod(shape)
    whole = None if strides is None else (length, *strides)
    out = array.file.reading.slots.empty((len(starts), *shape), shades.table.dtype, whole)
    if not out.numel():
        return out
    if _is_compiled(array):
        _delivered("deliver_pixels", array, starts, length, None, shades.compiled, out.data_ptr())
    else:
        flat = out.as_strided((len(starts), length), (length, 1))
        _one_by_one(array, starts, length, None, flat, lambda raw: _looked_up(raw, shades))
    return out


def _is_compiled(array: MappedArray) -> bool:
    """Whether the compiled loops are there, and know the byte order."""
    return compiled() is not None and array.dtype.isnative


def _delivered(
    loop: str, array: MappedArray, starts: Starts, length: int, lengths: np.ndarray | None, *rest: Any
) -> bool:
    """Give a compiled loop the file and the places of the runs; False where there is nothing to read."""
    file, item, firsts = array.file, array.dtype.itemsize, None
    first, stop = _bounds(array, starts, length, lengths)
    if first == stop:
        return False
    begin, end = array.offset + first * item, array.offset + stop * item
    if isinstance(starts, range):
        where = 0, begin, starts.step * item
    else:
        firsts = array.offset + np.asarray(starts, np.int64) * item
        where = firsts.ctypes.data, 0, 0
    items = len(starts) * length if lengths is None else int(lengths.sum())
    count, opened, reading = min(end - begin, items * item), file.opened(begin), file.reading
    told = getattr(opened.reader, loop)(
        *(reading.way(count), file.known[0], begin, end, *where, 0 if lengths is None else lengths.ctypes.data),
        *(len(starts), length, reading.threads, *rest),
    )
    file.hear(told, begin, end, count)
    return True


def _bounds(array: MappedArray, starts: Starts, length: int, lengths: np.ndarray | None) -> tuple[int, int]:
    """First item and one past the last of all runs, checked against the array."""
    if not len(starts) or not length or (lengths is not None and not lengths.any()):
        return 0, 0
    if isinstance(starts, range):
        first, stop = starts[0], starts[-1] + length
    else:
        first, stop = int(np.min(starts)), int(np.max(np.asarray(starts) + (length if lengths is None else lengths)))
    if first < 0 or stop > array.items:
        wanted = f"runs inside the {array.items} items of {array.file.name}"
        raise IndexError(f"starts: wanted {wanted}, got {first} to {stop}")
    return first, stop


def _one_by_one(
    array: MappedArray,
    starts: Starts,
    length: int,
    lengths: np.ndarray | None,
    out: Tensor,
    decode: Callable[[np.ndarray], Tensor],
) -> Tensor:
    _bounds(array, starts, length, lengths)
    item, rows = array.dtype.itemsize, out
    if isinstance(starts, range) and starts.step == length and lengths is None:  # they follow each other
        starts, length, rows = starts[:1], len(starts) * length, out.view(1, -1)
    for row, start in enumerate(starts):
        count = length if lengths is None else int(lengths[row])
        begin = array.offset + int(start) * item
        with array.file.view(begin, begin + count * item) as raw:
            numbers = raw.view(array.dtype)
            if out.dtype == torch.int64:
                _require_int64(array, begin, numbers)
            rows[row, :count] = decode(numbers)
    return out


def _require_int64(array: MappedArray, begin: int, numbers: np.ndarray) -> None:
    """Check numbers from byte ``begin`` on, here, where it is still known which byte they are from."""
    if numbers.dtype.kind == "u" and numbers.size and numbers.max() > HIGHEST:
        at = int(np.argmax(numbers > HIGHEST))
        wanted = f"integers up to {HIGHEST}"
        raise DamagedFile(
            f"{array.file.name}, byte {begin + at * array.dtype.itemsize}: wanted {wanted}, got {numbers[at]}"
        )


def _native(raw: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(raw, raw.dtype.newbyteorder("=")))


def _looked_up(raw: np.ndarray, shades: Shades) -> Tensor:
    channel = torch.arange(raw.size) // shades.run % len(shades.table)
    return shades.table[channel, torch.from_numpy(raw.astype(np.int64))]
