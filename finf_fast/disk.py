"""What is written is whole or not there, and what a disk refuses is an error that says which file."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

__all__ = ["naming", "replacing", "require_writable", "save_tensors", "sync"]


@contextmanager
def naming(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """An error of the disk inside the ``with`` names ``path``, and says ``what`` could not be done."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{what}: {error.strerror or error}", os.fspath(path)) from error


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name beside ``path`` for a new file, which takes its place when the ``with`` is left without an exception.

    At any instant a reader finds the old file or the new one, whole; after an exception the old one.
    """
    path, temporary = Path(path), _beside(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def require_writable(path: str | os.PathLike[str], argument: str) -> None:
    """Tries, before any work, what :func:`replacing` will do at its end.

    Raises:
        OSError: it cannot be done; ``argument`` is for the message.
    """
    with naming(path, f"{argument}: cannot write there"):
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        _beside(path).touch()
        _beside(path).unlink()


def _beside(path: str | os.PathLike[str]) -> Path:
    return Path(path).with_name(Path(path).name + ".tmp")


def sync(path: Path) -> None:
    """Makes a file durable; of a folder, the names created or renamed in it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def save_tensors(path: str | os.PathLike[str], value: Any) -> None:
    """``torch.save`` of a file that is whole or not there.

    Raises:
        OSError: it cannot be written, or the disk is too full for it; a file that was there before is left as it was.
    """
    with naming(path, "cannot save"), replacing(path) as temporary, open(temporary, "wb") as file:
        patient = _Patient(file)
        torch.save(value, patient)
        patient.check()


class _Patient:
    """A file that keeps the first refusal for the end: torch's writer, once refused, fails with another error."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._refusal: OSError | None = None

    def write(self, data: Any) -> int:
        if self._refusal is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._refusal = error
        return memoryview(data).nbytes

    def flush(self) -> None:
        """There is a ``check`` for it."""

    def check(self) -> None:
        if self._refusal is not None:
            raise self._refusal
        self._file.flush()
