"""Folders that ``save_to_disk`` of Hugging Face datasets leaves: which Arrow streams are the set, in which order."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finf_fast.corpus.arrow import ArrowCorpus, SelectedCorpus
from finf_fast.corpus.base import Corpus
from finf_fast.corpus.files import MappedFile
from finf_fast.corpus.joined import JoinedCorpus
from finf_fast.records import DamagedFile

__all__ = ["is_saved", "open_saved"]

STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"


def is_saved(folder: str | os.PathLike) -> bool:
    """Whether a folder is a dataset, or several splits of one, rather than a place for files."""
    return any(Path(folder, name).is_file() for name in (STATE, INFO, SPLITS))


def open_saved(path: str | os.PathLike, transform: Callable[[Any], Any] | None = None, **options: Any) -> Corpus:
    """The corpus of a saved dataset's folder, or of one stream; options as :class:`ArrowCorpus` takes them.

    Raises:
        ValueError: the folder holds several splits, or a dataset that was not saved.
        DamagedFile: a ``state.json`` that names no files; and as :class:`ArrowCorpus`.
    """
    if not os.path.isdir(path):
        return ArrowCorpus(path, transform=transform, **options)
    data, order = _listed(Path(path))
    if order:
        rows = _together(data, None, **options)
        return SelectedCorpus(rows, _together(order, None, columns=["indices"]), transform)
    return _together(data, transform, **options)


def _together(files: list[Path], transform: Callable[[Any], Any] | None, **options: Any) -> Corpus:
    if len(files) == 1:
        return ArrowCorpus(files[0], transform=transform, **options)
    return JoinedCorpus([ArrowCorpus(file, **options) for file in files], transform)


def _listed(folder: Path) -> tuple[list[Path], list[Path]]:
    """Streams of rows, and of indices where there are any, as ``state.json`` names them."""
    state = folder / STATE
    if (folder / SPLITS).is_file():
        inside = sorted(entry.name for entry in folder.iterdir() if (entry / STATE).is_file())
        raise ValueError(f"source: wanted the folder of one split, got {str(folder)!r} with {inside}")
    if not state.is_file():
        wanted = "a dataset saved by save_to_disk, or a pattern of its .arrow files"
        raise ValueError(f"source: wanted {wanted}, got {str(folder)!r} without {STATE}")
    file = MappedFile(state)
    content = file.head(file.size)
    try:
        found = json.loads(content)
        data, order = ([folder / _sound(file["filename"]) for file in found.get(key) or []]
                       for key in ("_data_files", "_indices_data_files"))  # fmt: skip
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedFile(f"{state}: wanted the names of a dataset's files, got {error!r}") from error
    if not data:
        raise DamagedFile(f"{state}: wanted the names of a dataset's files, got none")
    return data, order


def _sound(name: str) -> str:
    """A name that the system can be asked for; of another it says neither which it is nor who gave it."""
    if b"\0" in os.fsencode(name):
        raise ValueError(f"null byte in {name!r}")
    return name
