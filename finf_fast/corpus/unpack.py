"""Gzipped files, unpacked once: a copy in the cache, named after the archive's content, that later runs map."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import tempfile
import zlib
from pathlib import Path

from finf_fast.disk import naming
from finf_fast.records import DamagedFile

__all__ = ["gzip_head", "is_gzip", "unpacked"]

MAGIC = b"\x1f\x8b\x08"  # and deflate, the one method there is
PIECE = 1 << 20  # bytes copied at a time


def is_gzip(path: str | os.PathLike) -> bool:
    with open(path, "rb") as handle:
        return handle.read(len(MAGIC)) == MAGIC


def gzip_head(path: str | os.PathLike, count: int) -> bytes:
    """First bytes of what is packed inside.

    Raises:
        DamagedFile: the archive breaks before that.
    """
    try:
        with gzip.open(path) as packed:
            return packed.read(count)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DamagedFile(f"{os.fspath(path)}: gzip archive cannot be unpacked: {error}") from error


def unpacked(path: str | os.PathLike, cache: str | os.PathLike | None = None) -> Path:
    """Path of the unpacked copy, made now if it is not there; another process never sees half of one.

    Raises:
        DamagedFile: the archive breaks off or fails its own checksum; no copy is left.
        OSError: the cache cannot be written, or has no room for the copy; no part of it is left.
    """
    folder = Path(cache) if cache is not None else _default_cache()
    copy = folder / f"{_content_key(path)}-{Path(path).name.removesuffix('.gz')}"
    if not copy.is_file():
        with naming(copy, f"cannot unpack {os.fspath(path)!r} into the cache"):
            folder.mkdir(parents=True, exist_ok=True)
            _unpack(path, copy)
    return copy


def _unpack(path: str | os.PathLike, copy: Path) -> None:
    handle, partial = tempfile.mkstemp(dir=copy.parent, prefix=copy.name)
    try:
        with open(handle, "wb") as out, gzip.open(path) as packed:
            shutil.copyfileobj(packed, out, PIECE)
            out.flush()
            os.fsync(out.fileno())
        # An unpacked copy is as old as its archive: made again after the cache was emptied, it is the same file.
        changed_ns = os.stat(path).st_mtime_ns
        os.utime(partial, ns=(changed_ns, changed_ns))
        os.replace(partial, copy)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DamagedFile(f"{os.fspath(path)}: gzip archive cannot be unpacked: {error}") from error
    finally:
        Path(partial).unlink(missing_ok=True)


def _default_cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "finf_fast")


def _content_key(path: str | os.PathLike) -> str:
    hasher = hashlib.blake2b(digest_size=8)
    with open(path, "rb") as packed:
        while piece := packed.read(PIECE):
            hasher.update(piece)
    return hasher.hexdigest()
