"""What a source is: told by its type, and of a file by its first bytes, then its name; never by trying to read it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

from finf_fast.corpus.arrays import holds_arrays
from finf_fast.corpus.cifar import HUNDRED
from finf_fast.corpus.files import MappedFile
from finf_fast.corpus.idx import is_idx, is_mnist, map_idx
from finf_fast.corpus.megatron import has_index
from finf_fast.corpus.npy import MAGIC as NPY_MAGIC
from finf_fast.corpus.npy import map_npy
from finf_fast.corpus.olmo import olmo_table
from finf_fast.corpus.saved import is_saved
from finf_fast.corpus.stream import STREAM
from finf_fast.corpus.tokens import is_llmc
from finf_fast.corpus.unpack import gzip_head, is_gzip

__all__ = ["is_path", "map_labels", "own_folder", "recognise"]


def is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike))


def recognise(source: Any, given: dict[str, Any]) -> str:
    """Name of the format.

    Args:
        source: as the user gave it.
        given: options that are not None; ``window`` and ``collate_fn`` say what the user takes the source for.

    Raises:
        FileNotFoundError: no such file.
        TypeError, ValueError: nothing that is known.
    """
    if is_path(source):
        return _recognise_path(source, "window" in given)
    if isinstance(source, (tuple, list)) and source and all(map(is_path, source)):
        return _recognise_path(source[0], "window" in given)
    if holds_arrays(source) and "collate_fn" not in given:
        return "arrays"
    # A tuple or dict with something that is no array inside is a mistake in an array source, not a dataset.
    return "arrays" if isinstance(source, (tuple, Mapping)) else "dataset"


def map_labels(labels: Any, cache: str | os.PathLike | None) -> Any:
    """Labels as given, or mapped where they are a path to ``.npy`` or IDX.

    Raises:
        ValueError: a file that is neither.
    """
    if not is_path(labels):
        return labels
    head = _head(labels, "labels")
    if head.startswith(NPY_MAGIC):
        return map_npy(labels)
    if is_gzip(head) or is_idx(head[:4]):
        return map_idx(labels, cache)
    wanted = "an .npy or IDX file"
    raise ValueError(f"labels: wanted {wanted}, got {os.fspath(labels)!r}, which starts with {head[:4].hex(' ')!r}")


def _recognise_path(path: str | os.PathLike, windowed: bool) -> str:
    if os.path.isdir(path):
        return own_folder(path) or "idx"
    known = None if windowed else _by_name(os.fspath(path))
    if known is not None:
        return known
    head, name = _head(path, "source"), os.fspath(path)
    if is_gzip(head) and not windowed:  # tokens may begin with any two bytes
        head = gzip_head(MappedFile(path), 4)
    elif head.startswith(STREAM) and name.endswith(".arrow"):
        return "arrow"
    elif head.startswith(NPY_MAGIC):
        # A token stream saved as .npy is told from features by the window alone.
        return "tokens" if windowed else "npy"
    elif windowed or is_llmc(head) or name.endswith(".bin"):
        return "tokens"
    elif name.endswith(".npy"):
        return "npy"
    if is_idx(head[:4]):
        return "idx"
    wanted = "'npy', 'tokens' (with window) or 'idx' named"
    raise ValueError(f"format: wanted {wanted}, for {name!r} is not recognised: it starts with {head[:4].hex(' ')!r}")


def own_folder(path: str | os.PathLike) -> str | None:
    """The format of which a folder is one source; None where it holds files that are sources themselves, or none."""
    if is_saved(path):
        return "arrow"
    return "idx" if is_mnist(path) else None


def _by_name(name: str) -> str | None:
    """Formats of more than one file, and CIFAR's, whose bytes alone tell nothing."""
    short = os.path.basename(name)
    if has_index(name):
        return "megatron"
    if name.endswith(".ds") and os.path.isfile(name + ".index"):
        return "datatrove"
    if name.endswith(".npy") and os.path.isfile(olmo_table(name)) and not _head(name, "source").startswith(NPY_MAGIC):
        return "olmo"
    if fnmatch(short, "data_batch_[0-9].bin") or short == "test_batch.bin":
        return "cifar"
    hundred = short in HUNDRED and os.path.isfile(os.path.join(os.path.dirname(name), "fine_label_names.txt"))
    return "cifar" if hundred else None


def _head(path: str | os.PathLike, argument: str) -> bytes:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{argument}: wanted an existing file, got {os.fspath(path)!r}")
    return MappedFile(path).head(len(NPY_MAGIC))
