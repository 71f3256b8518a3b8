"""Files opened for reading only: the user's bytes are never written, and nothing that a disk does ends the process.

Every reading is checked twice. Before it, that the file is as long as it has to be; its bytes then come by calls that
can fail politely. After it, that the file is still the one that was opened: what was read from one that shrank, grew,
was written to, deleted or replaced meanwhile belongs to no corpus, and is not handed out. A write through a shared
mapping is not seen, as long as the system has not written it back and set the file's times.
"""

from __future__ import annotations

import errno
import math
import os
import resource
import stat
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from finf_fast.corpus.compiled import compiled
from finf_fast.corpus.digest import WHOLE, digest_rows
from finf_fast.corpus.reading import READ, reading_of_new_files
from finf_fast.records import DamagedFile

__all__ = ["MappedArray", "MappedFile"]

# Files held open at a time, of the 100,000 that a corpus may have: a process may open 1024 as a rule, of which a
# quarter, and on some file systems 590 maps are the limit.
MOST_OPEN = 128
Decoded = TypeVar("Decoded")


class MappedFile:
    """One regular file, looked at through mapped or copied memory, whichever its corpus has chosen.

    Args:
        path: the file.
        name: what messages call it, where that is not the path (an unpacked copy is called by its archive).

    Raises:
        OSError: it is missing or may not be read.
        ValueError: it is a directory, a pipe or a device.
    """

    def __init__(self, path: str | os.PathLike, name: str | None = None):
        self.path = os.fspath(path)
        self.name = name or self.path
        self._place = os.path.abspath(path)  # the working directory may change
        self._encoded = os.fsencode(self._place)
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"source: wanted a regular file, got {self.name!r}")
        self.reading = reading_of_new_files()
        self._opened: Opened | None = None
        self._reached = 0  # where the last reading ended
        opened = Opened(self._place)
        status = os.fstat(opened.descriptor)
        self.size, self.changed_ns = status.st_size, status.st_mtime_ns
        # What it is known as. One tuple, which another thread finds as it was or as it is.
        self.known = _identity(status), _attributes(status)
        # Some network file systems number their files anew; there the times of change have to do.
        self._numbered = not _on_network(opened.descriptor)
        if not self._numbered:
            self.reading.settle_for_network()
        self._hold(opened)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, and one in another process, opens the file for itself: a descriptor has one owner, who closes it."""
        return {**self.__dict__, "_opened": None}

    def head(self, count: int) -> bytes:
        """The first bytes, fewer where the file ends."""
        return self._bytes(0, min(count, self.size))

    @contextmanager
    def view(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Bytes ``[start, stop)`` as read-only uint8, to be copied or decoded inside the ``with``.

        Raises:
            DamagedFile: the file does not reach that far, or is no longer what it was.
        """
        if start == stop:
            yield np.empty(0, np.uint8)
            return
        if stop > self.size:
            wanted = f"bytes up to {stop}, got a file of {self.size} bytes"
            raise DamagedFile(f"{self.name}: is truncated: wanted {wanted}")
        yield self._copied(self.opened(start), start, stop)

    def hear(self, told: tuple[int, int, bool, bool, bool, float], start: int, stop: int, count: int) -> None:
        """What a compiled reading of ``count`` bytes between ``start`` and ``stop`` told (``_C.Reader``).

        Raises:
            DamagedFile: as for :meth:`view`.
        """
        error, byte, mapped, no_trial, same, seconds = told
        if error:
            self.refuse(error, byte, stop)
        self._reached = stop
        if self.reading.on_trial and not no_trial:
            self.reading.note(mapped, count, seconds)
        if not same:
            self.require_same(start)

    def require_same(self, start: int) -> None:
        """Check that the name still leads to the file that was opened, as it was; ``start`` is for the message.

        Raises:
            DamagedFile: it does not.
        """
        try:
            now = os.stat(self._place)
        except OSError as error:
            what = "was deleted" if isinstance(error, FileNotFoundError) else f"is out of reach ({error.strerror})"
            raise DamagedFile(f"{self.name}: {what} while it was read, at byte {start}") from error
        identity, known = _identity(now), self.known
        if identity[self._first :] == known[0][self._first :]:
            return
        if not _only_attributes(known, (identity, _attributes(now))):
            raise DamagedFile(f"{self.name}: {self._what_happened(now)} while it was read, at byte {start}")
        self.known = identity, _attributes(now)

    def refuse(self, error: int, start: int, stop: int) -> None:
        """Say what an error of a reading that broke off at byte ``start`` means: an errno, or -1 for an early end.

        Raises:
            DamagedFile: always.
        """
        self._opened = None  # the pages of a mapping may be lost for good
        self.require_same(start)
        if error == -1:
            raise DamagedFile(f"{self.name}, byte {start}: the file ends there, wanted bytes up to {stop}")
        reason = "it shrank or the disk failed" if error == errno.EFAULT else os.strerror(error)
        raise DamagedFile(f"{self.name}, byte {start}: {stop - start} bytes cannot be read: {reason}")

    def middle(self, count: int) -> bytes:
        """So many bytes around the middle, fewer where the file has not as many."""
        start = max(0, (self.size - count) // 2)
        return self._bytes(start, min(start + count, self.size))

    def digest(self, hasher: Any, whole: int = WHOLE) -> None:
        """Feed size and content to a hashlib object; of a file too large to hash whole, the time of change as well."""
        hasher.update(f"file {self.size}".encode())
        if self.size > whole:
            hasher.update(f" changed {self.changed_ns}".encode())
        digest_rows(hasher, self.size, 1, self._bytes, whole)

    @property
    def _first(self) -> int:
        return 0 if self._numbered else 2

    def _what_happened(self, now: os.stat_result) -> str:
        if now.st_size != self.size:
            verb = "shrank" if now.st_size < self.size else "grew"
            return f"{verb} from {self.size} to {now.st_size} bytes"
        replaced = self._numbered and _identity(now)[:2] != self.known[0][:2]
        if replaced:
            return "was replaced by another file"
        kept = now.st_mtime_ns == self.changed_ns
        return "changed (content, with its time put back, or attributes)" if kept else "was written to"

    def _copied(self, opened: Opened, start: int, stop: int) -> np.ndarray:
        count = stop - start
        copy = self.reading.slots.empty((count,), torch.uint8).numpy()
        if opened.reader is not None:
            one_row = 0, start, count, 0, 1, count
            told = opened.reader.deliver_raw(READ, self.known[0], start, stop, *one_row, 1, 1, 0, copy.ctypes.data)
            self.hear(told, start, stop, count)
        else:
            self._read_into(copy, opened.descriptor, start, stop)
            self.require_same(start)
        copy.flags.writeable = False
        return copy

    def _read_into(self, copy: np.ndarray, descriptor: int, at: int, stop: int) -> None:
        left = memoryview(copy)
        while left:
            try:
                got = os.preadv(descriptor, [left], at)
            except OSError as error:
                self.refuse(error.errno or errno.EIO, at, stop)
            if got == 0:
                self.refuse(-1, at, stop)
            left, at = left[got:], at + got

    def opened(self, start: int = 0) -> Opened:
        """What holds it open; opened again if too many files were opened since. ``start`` is for messages.

        Raises:
            DamagedFile: the name leads to another file by now, or to none.
        """
        return self._opened or self._opened_again(start)

    def _opened_again(self, start: int) -> Opened:
        try:
            opened = Opened(self._place)
        except FileNotFoundError:
            self.require_same(start)
            raise
        for _ in range(2):  # what only has other attributes is known anew the second time
            if _identity(os.fstat(opened.descriptor))[self._first :] == self.known[0][self._first :]:
                return self._hold(opened)
            self.require_same(start)
        raise DamagedFile(f"{self.name}: led to another file while it was opened again")

    def _hold(self, opened: Opened) -> Opened:
        opened.read_as(self._encoded, self.size, self._numbered, self._reached)
        self._opened = opened
        _held_open(self)
        return opened

    def _bytes(self, start: int, stop: int) -> bytes:
        with self.view(start, stop) as raw:
            return raw.tobytes()


@dataclass(frozen=True)
class MappedArray:
    """A C-ordered array inside a file: ``shape[0]`` rows from byte ``offset`` on."""

    file: MappedFile
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def __getitem__(self, rows: slice) -> MappedArray:
        """Rows that follow each other, as an array of their own."""
        first, last, _ = rows.indices(self.shape[0])
        return MappedArray(self.file, self.byte(first), self.dtype, (last - first, *self.shape[1:]))

    @property
    def items(self) -> int:
        return math.prod(self.shape)

    @property
    def row_items(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * self.row_items

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


class Opened:
    """A descriptor, and the compiled reader (``_C.Reader``) where it is there; closed when nobody holds it any more."""

    def __init__(self, path: str):
        self.reader: Any = None
        # Without waiting: a pipe that took the file's name is told from it once it is open.
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))

    def read_as(self, path: bytes, size: int, numbered: bool, reached: int) -> None:
        """Have the compiled reader, which then closes the descriptor."""
        loops = compiled()
        if loops is not None:
            self.reader = loops.Reader(self.descriptor, path, size, numbered, reached)

    def __del__(self, close=os.close):  # at the end of the interpreter there may be no `os` any more
        if self.reader is None and hasattr(self, "descriptor"):
            close(self.descriptor)


_open_files: OrderedDict[int, weakref.ref[MappedFile]] = OrderedDict()
_open_files_lock = threading.Lock()


def _unlock_in_child() -> None:
    """A fork may come while another thread holds the lock; that thread is not in the child to let go of it."""
    global _open_files_lock
    _open_files_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_in_child)


def _held_open(file: MappedFile) -> None:
    """Enter a file as open, and let go of those opened longest ago where there are too many."""
    with _open_files_lock:
        _open_files[id(file)] = weakref.ref(file)
        _open_files.move_to_end(id(file))
        surplus = max(0, len(_open_files) - min(MOST_OPEN, _allowed() // 4))
        oldest = [_open_files.popitem(last=False)[1]() for _ in range(surplus)]
    for each in oldest:
        if each is not None:
            each._opened = None  # whoever reads from it at this moment holds it until then


def _allowed() -> int:
    """Descriptors that this process may have by now, which it may change."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return soft if soft >= 4 else 1024  # -1 is no limit


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """What stays as long as a run's file does. The last one nobody can put back, though a change of attributes sets it
    as well; fingerprints do without it, for a copy of a corpus, or one that was moved, is the same corpus. Of times the
    last 64 bits, as the compiled module compares them: some file systems hold years before 1678 and after 2262."""
    changed, touched = status.st_mtime_ns % 2**64, status.st_ctime_ns % 2**64
    return status.st_dev, status.st_ino, status.st_size, changed, touched


def _attributes(status: os.stat_result) -> tuple[int, ...]:
    """What others may change of a file without touching its bytes: a backup links to it, an administrator gives it a
    mode or an owner."""
    return status.st_mode, status.st_nlink, status.st_uid, status.st_gid


def _only_attributes(known: tuple[tuple[int, ...], ...], now: tuple[tuple[int, ...], ...]) -> bool:
    """Whether of a file's (identity, attributes) only the attributes are others, and the last time with them.

    A write sets that time too, and may have put back the one before it, but leaves the attributes alone: where they are
    as they were, the bytes count as touched. A sample of the content would not tell, for it misses what was written
    beside it. What neither sees: a write, its time put back, and a change of attributes, all between two readings.
    """
    return now[0][:-1] == known[0][:-1] and now[1] != known[1]


def _on_network(descriptor: int) -> bool:
    loops = compiled()  # without them nothing is known: files are numbered, as nearly everywhere
    return loops is not None and loops.on_network(descriptor)
