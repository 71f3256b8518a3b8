"""What is written is whole or not there, and what a disk refuses is an error that says which file."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

__all__ = ["leftovers", "naming", "replacing", "require_writable", "save_tensors", "sync_folder"]

SUFFIX = ".tmp"
RANDOM = 8  # bytes in the name of a file that is not whole yet, so that no two writers share one
# What file systems answer that keep the names of a folder in their own way.
CANNOT_SYNC_FOLDERS = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextmanager
def naming(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """An error of the disk inside the ``with`` names ``path``, and says ``what`` could not be done."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{what}: {error.strerror or error}", os.fspath(path)) from error


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name for a new file, which takes the place of ``path`` when the ``with`` is left without an exception.

    At any instant a reader finds the old file or the new one, whole; after an exception the old one. A link is followed
    to what it stands for; a pipe or a device takes no part in this, and is itself the name.
    """
    place, there = _leads_to(path)
    if there is not None and not stat.S_ISREG(there.st_mode):
        yield place
        return
    temporary = _new_beside(place, there)
    try:
        yield temporary
        _sync(temporary)
        _keep_mode(temporary, there)
        os.replace(temporary, place)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(place.parent)


def leftovers(path: Path) -> list[Path]:
    """What a process that was killed inside :func:`replacing` of ``path`` left beside it."""
    ours = re.compile(re.escape(_prefix(path)) + f"[0-9a-f]{{{2 * RANDOM}}}" + re.escape(SUFFIX))
    return [entry for entry in path.parent.iterdir() if ours.fullmatch(entry.name)]


def require_writable(path: str | os.PathLike[str], argument: str) -> None:
    """Tries, before any work, what :func:`replacing` will do at its end.

    Raises:
        ValueError: an empty name; ``argument`` is for the message.
        OSError: it cannot be done.
    """
    if not os.fspath(path):
        raise ValueError(f"{argument}: wanted a file name, got {path!r}")
    with naming(path, f"{argument}: cannot write there"):
        place, there = _leads_to(path)
        if there is None or stat.S_ISREG(there.st_mode):
            _new_beside(place, there).unlink()
        elif stat.S_ISDIR(there.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        elif not os.access(place, os.W_OK):  # opening a pipe would wait for its reader
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _leads_to(path: str | os.PathLike[str]) -> tuple[Path, os.stat_result | None]:
    """Where a writing to ``path`` ends up, through all links, and what is there already."""
    path = os.fsdecode(path)
    try:
        there = os.stat(path)
    except FileNotFoundError:
        if not path:
            raise
        there = None
    # A pipe that is reached through /dev/stdout has no name of its own.
    is_special = there is not None and not stat.S_ISREG(there.st_mode)
    return Path(path if is_special else os.path.realpath(path)), there


def _new_beside(path: Path, there: os.stat_result | None) -> Path:
    """An empty file in the folder of ``path`` that was not there before, for nobody who may not read what is there."""
    temporary = path.with_name(f"{_prefix(path)}{secrets.token_hex(RANDOM)}{SUFFIX}")
    # tempfile would make it private, and what the umask allows can only be asked by changing it under other threads.
    mode = 0o666 if there is None else there.st_mode & 0o777 | 0o600
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
    return temporary


def _prefix(path: Path) -> str:
    """Hidden, and short: a name of 255 bytes leaves no room for more, and one of 16 characters has at most 64."""
    return f".{path.name[:16]}."


def _keep_mode(temporary: Path, there: os.stat_result | None) -> None:
    """Who may read and write the old file may do so with the new one; without an old one the umask has decided."""
    if there is not None and os.stat(temporary).st_mode != there.st_mode:
        os.chmod(temporary, stat.S_IMODE(there.st_mode))


def _sync(path: Path) -> None:
    """Makes the content of a file durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(path: Path) -> None:
    """Makes durable the names created or renamed in a folder, where its file system has a call for it."""
    try:
        _sync(path)
    except OSError as error:
        if error.errno not in CANNOT_SYNC_FOLDERS:
            raise


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
