"""Which files a list of paths, a pattern or a folder stands for, where they are one corpus together."""

from __future__ import annotations

import os
from glob import glob
from typing import Any

__all__ = ["folder_files", "paths_of"]

# What a folder is looked through for, by the ends of names; of formats of two files, the one that is given to open it.
# `.npy` counts where it holds tokens only: of two arrays in a folder, one is usually the other's labels.
ENDS = (".idx", ".ds", ".bin", ".npy", ".arrow")


def paths_of(source: Any) -> list[str] | None:
    """The files that a list of paths or a pattern stands for, a pattern's in the order of their names; else None.

    Raises:
        FileNotFoundError: a pattern that no file fits.
    """
    if isinstance(source, list) and source and all(isinstance(path, (str, os.PathLike)) for path in source):
        return list(map(os.fspath, source))
    if isinstance(source, (str, os.PathLike)) and not os.path.exists(source) and set(os.fspath(source)) & set("*?["):
        found = sorted(glob(os.fspath(source), recursive=True))
        if not found:
            raise FileNotFoundError(f"source: no file fits the pattern {os.fspath(source)!r}")
        return found
    return None


def folder_files(folder: str | os.PathLike, windowed: bool) -> list[str]:
    """Data files of one kind right in a folder, in the order of their names; none where it holds none.

    Args:
        folder: an existing one.
        windowed: token files are wanted.

    Raises:
        ValueError: there are several kinds.
    """
    with os.scandir(folder) as entries:
        names = {entry.name for entry in entries if entry.is_file()}
    kinds: dict[str, list[str]] = {}
    for name in sorted(names):
        stem, end = os.path.splitext(name)
        beside = end == ".bin" and stem + ".idx" in names
        arrays = end == ".npy" and not windowed and stem + ".csv.gz" not in names
        if end in ENDS and not beside and not arrays:
            kinds.setdefault(end, []).append(os.path.join(os.fspath(folder), name))
    if len(kinds) > 1:
        found = ", ".join(f"{len(files)} *{end}" for end, files in kinds.items())
        raise ValueError(
            f"source: wanted a folder with data files of one kind, got {found} in {os.fspath(folder)!r}: give a pattern"
        )
    return next(iter(kinds.values()), [])
