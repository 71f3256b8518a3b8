"""Gzipped files: read front to back, or unpacked once, a copy in the cache, named after the archive's content, that
later runs map.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finf_fast.corpus.files import MappedFile
from finf_fast.disk import naming
from finf_fast.records import DamagedFile

__all__ = ["BROKEN", "gzip_head", "is_gzip", "unpacked", "unpacking"]

MAGIC = b"\x1f\x8b\x08"  # and deflate, the one method there is
PIECE = 1 << 20  # bytes copied at a time
PACKED = 1 << 17  # bytes of an archive read at a time
BROKEN = (EOFError, gzip.BadGzipFile, zlib.error)  # what a damaged archive raises


def is_gzip(head: bytes) -> bool:
    """Whether a file's first three bytes are a gzip archive's."""
    return head.startswith(MAGIC)


def gzip_head(file: MappedFile, count: int) -> bytes:
    """First bytes of what is packed inside.

    Raises:
        DamagedFile: the archive breaks before that.
    """
    with _broken_is_named(file), unpacking(file) as packed:
        return packed.read(count)


def unpacking(file: MappedFile, hasher: Any = None) -> gzip.GzipFile:
    """What is packed inside, to be read front to back; the archive's own bytes are fed to a hashlib object.

    Its readings raise what is in ``BROKEN``, and DamagedFile where the disk fails or the archive changes meanwhile.
    """
    return gzip.GzipFile(fileobj=io.BufferedReader(_Archive(file, hasher), PACKED), mode="rb")


def unpacked(file: MappedFile, cache: str | os.PathLike | None = None, anew: bool = False) -> Path:
    """Path of the unpacked copy, made now if it is not there; another process never sees half of one.

    Args:
        file: the archive.
        cache: folder of the copy; None for the default.
        anew: make it again, for the one that is there is no good.

    Raises:
        DamagedFile: the archive breaks off, fails its own checksum, or changes meanwhile; no copy is left.
        OSError: the cache cannot be written, or has no room for the copy; no part of it is left.
    """
    folder, key = Path(cache) if cache is not None else _default_cache(), _content_key(file)
    copy = folder / f"{key}-{Path(file.path).name.removesuffix('.gz')}"
    if anew or not copy.is_file():
        with naming(copy, f"cannot unpack {file.name!r} into the cache"):
            folder.mkdir(parents=True, exist_ok=True)
            _unpack(file, copy, key)
    return copy


def _unpack(file: MappedFile, copy: Path, key: str) -> None:
    (handle, partial), hasher = tempfile.mkstemp(dir=copy.parent, prefix=copy.name), _new_hasher()
    try:
        with _broken_is_named(file), open(handle, "wb") as out, unpacking(file, hasher) as packed:
            shutil.copyfileobj(packed, out, PIECE)
            out.flush()
            os.fsync(out.fileno())
        # A write that left all times as they were, or nearly at once: such a copy would be the wrong one for good.
        if hasher.hexdigest() != key:
            raise DamagedFile(f"{file.name}: was written to while it was unpacked")
        # An unpacked copy is as old as its archive: made again after the cache was emptied, it is the same file.
        os.utime(partial, ns=(file.changed_ns, file.changed_ns))
        os.replace(partial, copy)
    finally:
        Path(partial).unlink(missing_ok=True)


def _default_cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "finf_fast")


def _content_key(file: MappedFile) -> str:
    hasher, packed = _new_hasher(), _Archive(file)
    while piece := packed.read(PIECE):
        hasher.update(piece)
    return hasher.hexdigest()


def _new_hasher() -> Any:
    return hashlib.blake2b(digest_size=8)


@contextmanager
def _broken_is_named(file: MappedFile) -> Iterator[None]:
    try:
        yield
    except BROKEN as error:
        raise DamagedFile(f"{file.name}: gzip archive cannot be unpacked: {error}") from error


class _Archive(io.RawIOBase):
    """A file front to back, every piece checked as all readings are: that the disk gave it, and that it is the same."""

    def __init__(self, file: MappedFile, hasher: Any = None):
        self._file, self._hasher, self._at = file, hasher, 0

    def readable(self) -> bool:
        return True

    def readinto(self, room: Any) -> int:
        stop = min(self._at + len(room), self._file.size)
        with self._file.view(self._at, stop) as raw:
            memoryview(room)[: len(raw)] = raw.data
            if self._hasher is not None:
                self._hasher.update(raw)
        self._at = stop
        return len(raw)
