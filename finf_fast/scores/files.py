"""Bytes on disk: whole-file replacement that survives a crash, ``.npy`` files written at offsets, the lock."""

from __future__ import annotations

import errno
import fcntl
import io
import math
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from finf_fast.disk import naming, replacing
from finf_fast.records import DamagedFile

# Linux and macOS differ: the portable call also flushes timestamps, which costs time and nothing else.
datasync = getattr(os, "fdatasync", os.fsync)

# What a file system answers when it cannot reserve space; the file is then extended as a hole instead.
CANNOT_RESERVE = {errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS}


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Writes all of ``data`` at ``offset``; one call may take only a part of it (2 GiB limit, signals)."""
    while data:
        written = os.pwrite(fd, data, offset)
        data = data[written:]
        offset += written


def replace_text(path: Path, text: str) -> None:
    """Replaces the file at ``path`` so that at any instant a reader finds the old text or the new one, whole.

    Raises:
        OSError: it cannot be written; the old text is still there.
    """
    with naming(path, "cannot write"), replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def lock(path: Path) -> int:
    """Takes the writer's lock and returns its descriptor; the system lets go of it when the process ends, however.

    Raises:
        ValueError: another writer holds it.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as err:
        os.close(fd)
        raise ValueError(
            f"out: wanted a result folder that nobody else writes to, got {path.parent}, locked by another sweep"
        ) from err
    except OSError:
        os.close(fd)
        raise
    return fd


def reserve(fd: int, size: int) -> None:
    """Gives the file its full size on disk now, so that a full disk is found before hours of work, not after."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size)
            return
    except OSError as err:
        if err.errno not in CANNOT_RESERVE:
            raise
    os.ftruncate(fd, size)


def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    buffer = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def check_npy(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Offset of the data in the ``.npy`` file at ``path``, once header and size are what the manifest promises.

    Raises:
        DamagedFile: missing, another header, or another size; says which and by how much.
    """
    wanted = (shape, False, dtype)
    try:
        with open(path, "rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("an .npy version that this library does not write")
            found = np.lib.format.read_array_header_1_0(file)
            offset = file.tell()
    except FileNotFoundError as err:
        raise DamagedFile(f"{path}: missing, but the manifest names it") from err
    except ValueError as err:
        raise DamagedFile(f"{path}: the .npy header is damaged ({err})") from err
    if found != wanted:
        raise DamagedFile(f"{path}: wanted (shape, fortran order, dtype) = {wanted}, got {found}")
    check_size(path, offset + math.prod(shape) * dtype.itemsize)
    return offset


def check_size(path: Path, wanted: int, opened: int | None = None) -> None:
    """Raises ``DamagedFile`` where the file, by its name or as it was opened, has another size."""
    size = (path.stat() if opened is None else os.fstat(opened)).st_size
    if size != wanted:
        raise DamagedFile(f"{path}: wanted {wanted} bytes, got {size}")


class RowFile:
    """One ``.npy`` file of fixed shape, of which rows are written in any order.

    ``pwrite`` instead of a writable map: an input/output error is an exception here and a dead process there.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype, offset: int):
        self.path = path
        self.offset = offset
        self.row_bytes = math.prod(shape[1:]) * dtype.itemsize
        self.size = offset + shape[0] * self.row_bytes
        self.fd = os.open(path, os.O_RDWR)

    @classmethod
    def create(cls, path: Path, shape: tuple[int, ...], dtype: np.dtype) -> RowFile:
        header = npy_header(shape, dtype)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            reserve(fd, len(header) + math.prod(shape) * dtype.itemsize)
            write_at(fd, memoryview(header), 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        return cls(path, shape, dtype, len(header))

    @classmethod
    def open(cls, path: Path, shape: tuple[int, ...], dtype: np.dtype) -> RowFile:
        return cls(path, shape, dtype, check_npy(path, shape, dtype))

    def write(self, row: int, data: np.ndarray) -> None:
        check_size(self.path, self.size, self.fd)  # written past its end, a file that was cut would be whole again
        view = memoryview(np.ascontiguousarray(data)).cast("B")
        with naming(self.path, f"cannot write row {row} and on"):
            write_at(self.fd, view, self.offset + row * self.row_bytes)

    def sync(self) -> None:
        with naming(self.path, "cannot make its rows durable"):
            datasync(self.fd)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


def write_new(
    path: str | os.PathLike[str], shape: tuple[int, ...], dtype: np.dtype, blocks: Iterable[tuple[int, np.ndarray]]
) -> np.ndarray:
    """Writes (first row, rows) one after the other to a new ``.npy`` file, whole or not at all, and maps it read-only.

    Raises:
        ValueError: something is there already; it could be what the blocks are read from.
        OSError: the file cannot be written, or the disk is too full for all of it.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"out: wanted a new file, got {path}, which is there already")
    with naming(path, "out"), replacing(path) as temporary:
        _write_rows(temporary, shape, dtype, blocks)
    return np.load(path, mmap_mode="r")


def _write_rows(path: Path, shape: tuple[int, ...], dtype: np.dtype, blocks: Iterable[tuple[int, np.ndarray]]) -> None:
    file = RowFile.create(path, shape, dtype)
    try:
        for row, block in blocks:
            file.write(row, block.astype(dtype))
        file.sync()
    finally:
        file.close()
