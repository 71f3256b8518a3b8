"""Which files a list of paths, a pattern or a folder stands for, where they are one corpus together."""

from __future__ import annotations

import logging
import os
import re
from glob import glob
from typing import Any

__all__ = ["folder_files", "paths_of"]

log = logging.getLogger("finf_fast")

# What a folder is looked through for, by the ends of names; of formats of two files, the one that is given to open it.
# `.npy` counts where it holds tokens only: of two arrays in a folder, one is usually the other's labels.
ENDS = (".idx", ".ds", ".bin", ".npy", ".arrow")
SHOWN = 5  # names in a message
HELD_OUT = {"val", "valid", "validation", "test", "dev", "eval"}
# Of files that two make up, each is nothing without the other.
PAIRS = ((".csv.gz", ".npy"), (".ds.index", ".ds"))
# Ends of names that go with another file, and the end of that one's.
BESIDE = (
    *((".bin", ".idx"), (".csv.gz", ".npy")),
    *((".ds.index", ".ds"), (".ds.loss", ".ds"), (".ds.metadata", ".ds")),
)


def paths_of(source: Any) -> list[str] | None:
    """The files that a list of paths or a pattern stands for, a pattern's in the order of their names; else None.

    Of a pair (``P.idx`` and ``P.bin``) only the one that is given to open it.

    Raises:
        FileNotFoundError: a pattern that no file fits.
    """
    if isinstance(source, list) and source and all(isinstance(path, (str, os.PathLike)) for path in source):
        return _openable(list(map(os.fspath, source)))
    if isinstance(source, (str, os.PathLike)) and not os.path.exists(source) and set(os.fspath(source)) & set("*?["):
        found = sorted(glob(os.fspath(source), recursive=True))
        if not found:
            raise FileNotFoundError(f"source: no file fits the pattern {os.fspath(source)!r}")
        return _openable(found)
    return None


def _openable(paths: list[str]) -> list[str]:
    """Without the other files of what several files make up: a pair would be the same samples twice, or an error."""
    there = set(paths)
    others = {path for path in paths for end, main in BESIDE
              if path.endswith(end) and path.removesuffix(end) + main in there}  # fmt: skip
    return _filled([path for path in paths if path not in others])


def _filled(paths: list[str]) -> list[str]:
    """Without the pairs of nothing that datatrove leaves where one of its workers had no document."""
    left = [path for path in paths if not (path.endswith(".ds") and _is_empty(path) and _is_empty(path + ".index"))]
    return left or paths


def _is_empty(path: str) -> bool:
    return os.path.isfile(path) and os.path.getsize(path) == 0


def folder_files(folder: str | os.PathLike, windowed: bool) -> list[str]:
    """Data files of one kind right in a folder, in the order of their names; none where it holds none.

    What is held out, by its name, is left away beside what is to train on, as of MNIST and CIFAR, and logged. Hidden
    files, such as macOS leaves beside a file it copies (``._train.bin``), are none, as for a pattern. A link that leads
    nowhere, or a pipe, counts by its name, for whoever opens it to refuse.

    Args:
        folder: an existing one.
        windowed: token files are wanted.

    Raises:
        ValueError: there are several kinds.
        FileNotFoundError: one of two files that belong together is not there.
    """
    with os.scandir(folder) as entries:
        names = {entry.name for entry in entries if not (entry.is_dir() or entry.name.startswith("."))}
    kinds: dict[str, list[str]] = {}
    for name in sorted(names):
        stem, end = os.path.splitext(name)
        beside = end == ".bin" and stem + ".idx" in names
        arrays = end == ".npy" and not windowed and stem + ".csv.gz" not in names
        if end in ENDS and not beside and not arrays:
            kinds.setdefault(end, []).append(name)
    if len(kinds) > 1:
        found = ", ".join(f"{len(files)} *{end}" for end, files in kinds.items())
        raise ValueError(
            f"source: wanted a folder with data files of one kind, got {found} in {os.fspath(folder)!r}: give a pattern"
        )
    kind, found = next(iter(kinds.items()), ("", []))
    chosen = _trained_on(found)
    if not windowed:
        _require_pairs(folder, names - (set(found) - set(chosen)), kind)
    return _filled([os.path.join(os.fspath(folder), name) for name in chosen])


def _require_pairs(folder: str | os.PathLike, names: set[str], kind: str) -> None:
    """Neither half of a pair is passed over because the other was lost: its samples would be missing in silence."""
    for other, main in PAIRS:
        if main != kind:
            continue
        stems = [{name.removesuffix(end) for name in names if name.endswith(end)} for end in (other, main)]
        for stem in sorted(stems[0] ^ stems[1]):
            ends = (other, main) if stem in stems[0] else (main, other)
            there, gone = (os.path.join(os.fspath(folder), stem + end) for end in ends)
            raise FileNotFoundError(f"source: wanted {gone!r} beside {there!r}; a pattern takes some files of a folder")


def _trained_on(names: list[str]) -> list[str]:
    """Without what a name says is held out, where others say they are to train on: ``val.bin`` beside ``train.bin``."""
    words = {name: set(re.split(r"[^a-z]+", name.lower())) for name in names}
    if not any("train" in said for said in words.values()):
        return names
    trained = [name for name in names if not words[name] & HELD_OUT]
    if out := sorted(set(names) - set(trained)):
        log.warning("left away as held out, by name: %d of %d files: %s", len(out), len(names), ", ".join(out[:SHOWN]))
    return trained
