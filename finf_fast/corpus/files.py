"""Files opened for reading only, by mapping: nothing is copied at opening and the user's bytes are never written.

A mapped file that shrinks would kill the process at the next touch, so each range is checked, and its pages are brought
in by a call that can fail politely, before anybody looks at them; they are let go right after, so that the memory
of a sweep does not grow with the file.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from finf_fast.corpus.digest import WHOLE, digest_rows
from finf_fast.records import DamagedFile

__all__ = ["MappedArray", "MappedFile"]

MADV_POPULATE_READ = 22  # Linux 5.14; the mmap module has no name for it
Decoded = TypeVar("Decoded")


class MappedFile:
    """One regular file, mapped read-only.

    Args:
        path: the file to map.
        name: what messages call it, where that is not the path (an unpacked copy is called by its archive).

    Raises:
        OSError: it is missing or may not be read.
        ValueError: it is a directory, a pipe or a device.
    """

    def __init__(self, path: str | os.PathLike, name: str | None = None):
        self.path = os.fspath(path)
        self.name = name or self.path
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"source: wanted a regular file, got {self.name!r}")
        with open(path, "rb") as handle:
            status = os.fstat(handle.fileno())
            self.size, self.changed_ns = status.st_size, status.st_mtime_ns
            # An empty file cannot be mapped; the format's header check says what is wrong with it.
            self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) if self.size else None

    def head(self, count: int) -> bytes:
        """The first bytes, fewer where the file ends."""
        return self._bytes(0, min(count, self.size))

    @contextmanager
    def view(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Bytes ``[start, stop)`` as read-only uint8, to be copied or decoded inside the ``with``.

        Raises:
            DamagedFile: the file does not reach that far, or no longer does.
        """
        if start == stop:
            yield np.empty(0, np.uint8)
            return
        self._require(stop)
        first = start - start % mmap.PAGESIZE
        self._bring_in(first, stop - first)
        yield np.frombuffer(self._map, np.uint8, stop - start, start)
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, stop - first)

    def _require(self, stop: int) -> None:
        now = self._map.size() if self._map is not None else 0
        if stop > min(now, self.size):
            verb = "shrank" if now < self.size else "is truncated"
            raise DamagedFile(f"{self.name}: {verb}: wanted bytes up to {stop}, got a file of {now} bytes")

    def _bring_in(self, start: int, count: int) -> None:
        if not hasattr(self._map, "madvise"):
            return
        try:
            self._map.madvise(MADV_POPULATE_READ, start, count)
        except OSError as error:
            # An older kernel does not know the advice; the check of the size before it is then all there is.
            if error.errno != errno.EINVAL:
                reason = "it shrank or the disk failed"
                raise DamagedFile(f"{self.name}, byte {start}: {count} bytes cannot be read: {reason}") from error

    def digest(self, hasher: Any) -> None:
        """Feed size and content to a hashlib object; of a file too large to hash whole, the time of change as well."""
        hasher.update(f"file {self.size}".encode())
        if self.size > WHOLE:
            hasher.update(f" changed {self.changed_ns}".encode())
        digest_rows(hasher, self.size, 1, self._bytes)

    def _bytes(self, start: int, stop: int) -> bytes:
        with self.view(start, stop) as raw:
            return raw.tobytes()


@dataclass(frozen=True)
class MappedArray:
    """A C-ordered array inside a mapped file: ``shape[0]`` rows from byte ``offset`` on."""

    file: MappedFile
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])

    def require_whole(self) -> None:
        """Compare the size that the header promises with the file's own, before any work.

        Raises:
            DamagedFile: there are fewer or more bytes than promised.
        """
        wanted, got = self.offset + self.shape[0] * self.row_bytes, self.file.size
        if wanted != got:
            where = "the data end" if got < wanted else "bytes are left over"
            raise DamagedFile(
                f"{self.file.name}: wanted {wanted} bytes (header {self.offset}, shape {self.shape}, {self.dtype}), "
                f"got {got}: {where} at byte {min(wanted, got)}"
            )

    def rows(self, start: int, stop: int, decode: Callable[[np.ndarray], Decoded]) -> Decoded:
        """Hand rows ``[start, stop)`` to ``decode``, which returns something of its own, not a view."""
        with self.file.view(self.byte(start), self.byte(stop)) as raw:
            return decode(raw.view(self.dtype).reshape(stop - start, *self.shape[1:]))

    def byte(self, row: int) -> int:
        return self.offset + row * self.row_bytes

    def place(self, row: int) -> str:
        return f"{self.file.name}, byte {self.byte(row)}"
