"""Where rows go: a result folder or memory, both behind ``write``, ``sync``, ``flag``, ``save_manifest``, ``close``.

The order on disk is what makes an interrupted run safe: rows, then ``sync`` (they are durable), then ``flag``. A flag
that is found after any crash therefore stands for bytes that are there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from finf_fast.disk import leftovers, naming, sync_folder
from finf_fast.records import DamagedFile
from finf_fast.scores import manifest as manifests
from finf_fast.scores.files import RowFile, check_npy, check_size, datasync, lock, write_at

LOCK = "lock"
DONE = "done"


class Memory:
    """Arrays of this process; what is scored is lost with it."""

    path = None

    def __init__(self, manifest: dict[str, Any]):
        self.manifest = {**manifest, "ready": True}
        dtype = np.dtype(manifest["dtype"])
        self.arrays = {name: np.zeros(shape, dtype) for name, shape in manifests.arrays_of(manifest).items()}
        self.done = np.zeros(manifests.plan_of(manifest).blocks, np.uint8)

    def create(self, ready: bool = True) -> None:
        """The arrays are there."""

    def write(self, name: str, row: int, data: np.ndarray) -> None:
        self.arrays[name][row : row + len(data)] = data

    def sync(self) -> None:
        """Nothing outlives the process."""

    def flag(self, numbers: Iterable[int]) -> None:
        self.done[list(numbers)] = 1

    def save_manifest(self, manifest: dict[str, Any]) -> None:
        self.manifest = manifest

    def close(self) -> None:
        """Nothing to give back."""


class Folder:
    """A result folder held by this process, its arrays open for writing."""

    def __init__(self, path: Path, lock_fd: int, manifest: dict[str, Any]):
        self.path = path
        self.manifest = manifest
        self._lock = lock_fd
        self._files: dict[str, RowFile] = {}
        self._done = -1

    def create(self, ready: bool = True) -> None:
        """Makes the arrays at their full size; until the manifest says ``ready`` the folder counts as empty.

        Raises:
            OSError: no room, or no right to write; what was made is taken away again.
        """
        dtype, shapes = np.dtype(self.manifest["dtype"]), manifests.arrays_of(self.manifest)
        try:
            self._discard()
            manifests.write(self.path, {**self.manifest, "ready": False})
            self._files = {name: RowFile.create(array_path(self.path, name), shapes[name], dtype) for name in shapes}
            self._create_done()
            self.save_manifest({**self.manifest, "ready": ready})
        except OSError as err:
            self._discard()
            size = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
            raise OSError(err.errno, f"{err.strerror}: the result needs {size} bytes", str(self.path)) from err

    def open(self) -> None:
        """Opens the arrays of an earlier run.

        Raises:
            DamagedFile: a file is not what the manifest says.
        """
        self.done = check_folder(self.path, self.manifest)
        for path in leftovers(self.path / manifests.NAME):
            path.unlink()
        dtype = np.dtype(self.manifest["dtype"])
        for name, shape in manifests.arrays_of(self.manifest).items():
            self._files[name] = RowFile.open(array_path(self.path, name), shape, dtype)
        self._done = os.open(self.path / DONE, os.O_RDWR)

    def write(self, name: str, row: int, data: np.ndarray) -> None:
        self._files[name].write(row, data)

    def sync(self) -> None:
        for file in self._files.values():
            file.sync()

    def flag(self, numbers: Iterable[int]) -> None:
        """Marks blocks as done. Call ``sync`` first.

        Raises:
            OSError: the disk failed; they are not marked.
        """
        numbers, flags = list(numbers), self.done.copy()
        flags[numbers] = 1
        # One write from the first to the last: flags between them are as they were.
        first, last = min(numbers), max(numbers)
        with naming(self.path / DONE, f"cannot flag blocks {first} to {last}"):
            write_at(self._done, memoryview(flags)[first : last + 1], first)
            datasync(self._done)
        self.done = flags

    def save_manifest(self, manifest: dict[str, Any]) -> None:
        manifests.write(self.path, manifest)
        self.manifest = manifest

    def close(self) -> None:
        """Closes the files, then lets go of the lock. Harmless when repeated."""
        for file in self._files.values():
            file.close()
        for fd in (self._done, self._lock):
            if fd >= 0:
                os.close(fd)
        self._done = self._lock = -1

    def _create_done(self) -> None:
        self.done = np.zeros(manifests.plan_of(self.manifest).blocks, np.uint8)
        self._done = os.open(self.path / DONE, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        # Written, not reserved, which not every file system can: rows that found the last room must find their flags'.
        write_at(self._done, memoryview(self.done), 0)
        os.fsync(self._done)
        sync_folder(self.path)

    def _discard(self) -> None:
        """Takes away what a run that never got ready left; the manifest last, since it says whose files these are."""
        arrays = [array_path(self.path, name) for name in manifests.ARRAYS]
        manifest = self.path / manifests.NAME
        for path in (*arrays, self.path / DONE, *leftovers(manifest), manifest):
            path.unlink(missing_ok=True)


class Mapped(dict[str, np.ndarray]):
    """Arrays of a folder by name, not read; rows of blocks that are not done are NaN.

    Looked up while the files that were mapped, whatever they are called by now, are as long as they were, DamagedFile
    otherwise: whoever looks at a mapping beyond the end of its file is killed. A copy holds plain arrays.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], done: np.ndarray):
        self._maps = {}
        for name in manifests.arrays_of(manifest):
            path = array_path(folder, name)
            mapped = _mapped(path, done, manifest)
            self._maps[name] = path, mapped._mmap, mapped._mmap.size()
            self[name] = np.asarray(mapped)

    def __getitem__(self, name: str) -> np.ndarray:
        path, mapping, size = self._maps[name]
        if mapping.size() != size:
            raise DamagedFile(f"{path}: wanted {size} bytes, got {mapping.size()}")
        return super().__getitem__(name)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401 (this is what `get` is made of)


def _mapped(path: Path, done: np.ndarray, manifest: dict[str, Any]) -> np.memmap:
    if done.all():
        return np.load(path, mmap_mode="r")
    array = np.load(path, mmap_mode="c")  # copy on write: only pages that get a NaN cost memory
    plan = manifests.plan_of(manifest)
    for number in np.flatnonzero(done == 0).tolist():
        start, stop = plan.rows(number)
        array[start - plan.start : stop - plan.start] = math.nan
    return array


def array_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


def claim(out: str | os.PathLike[str], manifest: dict[str, Any]) -> Folder:
    """Makes the folder if need be, takes its lock, and hands it over with the manifest it holds, or else ``manifest``.

    The caller looks at ``.manifest["ready"]``: true means an earlier run's scores are there (``open``), false that
    there is nothing (``create``).

    Raises:
        ValueError: a file lies there, other files lie in it, or another writer holds it.
        OSError: it cannot be made or written.
        DamagedFile: its manifest cannot be read.
    """
    path = Path(out)
    make_folder(path)
    refuse_foreign(path)
    folder = Folder(path, take_lock(path), manifest)
    try:
        if (path / manifests.NAME).exists():
            found = manifests.read(path)
            folder.manifest = found if found["ready"] else manifest
    except BaseException:
        folder.close()
        raise
    return folder


def make_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"out: wanted a folder, got the file {path}")
    with naming(path, "out: cannot make the result folder"):
        path.mkdir(parents=True, exist_ok=True)


def take_lock(path: Path) -> int:
    with naming(path, "out: cannot write in the result folder"):
        return lock(path / LOCK)


def refuse_foreign(path: Path) -> None:
    """Raises ``ValueError`` when files lie there that no run of ours wrote."""
    # The list is taken before the look for a manifest: a run starting now writes its manifest before its arrays.
    others = {entry.name for entry in path.iterdir()} - {LOCK}
    # A run killed before its first manifest must be able to start again.
    others -= {entry.name for entry in leftovers(path / manifests.NAME)}
    if others and not (path / manifests.NAME).exists():
        shown = ", ".join(sorted(others)[:5])
        raise ValueError(f"out: wanted an empty folder or a result folder, got {path} with other files ({shown})")


def check_folder(path: Path, manifest: dict[str, Any]) -> np.ndarray:
    """The completion flags (blocks,) uint8, once every file has the header and size that the manifest promises.

    Raises:
        DamagedFile: names the file, the wanted and the got.
    """
    if not manifest["ready"]:
        raise DamagedFile(f"{path}: the run was stopped while the folder was being made; it holds no scores")
    for name, shape in manifests.arrays_of(manifest).items():
        check_npy(array_path(path, name), shape, np.dtype(manifest["dtype"]))
    done = path / DONE
    if not done.exists():
        raise DamagedFile(f"{done}: missing, but the manifest names it")
    check_size(done, manifests.plan_of(manifest).blocks)
    flags = np.frombuffer(done.read_bytes(), np.uint8).copy()
    if flags.max() > 1:
        number = int(np.argmax(flags > 1))
        raise DamagedFile(f"{done}: wanted a 0 or 1 for each block, got {flags[number]} at block {number}")
    return flags
