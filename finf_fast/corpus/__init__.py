"""Stage 1, disk: open training data where it lies, check it before any work, and hand out row ranges as batches.

One format a page: arrays, npy, tokens, idx, cifar, megatron, olmo, datatrove, arrow, dataset. This page only tells them
apart.
"""

from __future__ import annotations

import logging
import os
import reprlib
from collections.abc import Sequence
from glob import escape, glob
from itertools import pairwise
from typing import Any

import numpy as np

from finf_fast.corpus.arrays import ArrayCorpus, require_label_array
from finf_fast.corpus.base import Corpus
from finf_fast.corpus.cifar import CifarCorpus, cifar_files
from finf_fast.corpus.dataset import DatasetCorpus
from finf_fast.corpus.datatrove import DatatroveCorpus
from finf_fast.corpus.draw import evenly
from finf_fast.corpus.files import MappedArray
from finf_fast.corpus.idx import IdxCorpus
from finf_fast.corpus.joined import JoinedCorpus
from finf_fast.corpus.megatron import MegatronCorpus
from finf_fast.corpus.npy import NpyCorpus
from finf_fast.corpus.olmo import OlmoCorpus
from finf_fast.corpus.reading import Reading, adopting
from finf_fast.corpus.recognise import is_path, map_labels, own_folder, recognise
from finf_fast.corpus.saved import open_saved
from finf_fast.corpus.shards import folder_files, paths_of
from finf_fast.corpus.tokens import NoWindow, TokenCorpus
from finf_fast.corpus.undecoded import Undecoded

__all__ = ["Corpus", "Undecoded", "evenly", "open_corpus"]

log = logging.getLogger("finf_fast")

KINDS = (
    *(ArrayCorpus, NpyCorpus, TokenCorpus, IdxCorpus, CifarCorpus),
    *(MegatronCorpus, OlmoCorpus, DatatroveCorpus, DatasetCorpus),
)
FORMATS = {corpus.format: corpus for corpus in KINDS} | {"arrow": open_saved}
OPTIONS = {
    "arrays": {"labels"},
    "npy": {"labels", "mean", "std", "layout", "dtype"},
    "tokens": {"window", "stride", "dtype", "header"},
    "idx": {"labels", "mean", "std", "layout", "dtype", "cache"},
    "cifar": {"mean", "std", "dtype"},
    "megatron": {"sample", "max_length"},
    "olmo": {"max_length"},
    "datatrove": {"max_length"},
    "arrow": {"columns", "max_length"},
    "dataset": {"collate_fn"},
}


def open_corpus(
    source: Any,
    *,
    format: str | None = None,
    labels: Any = None,
    window: int | None = None,
    stride: int | None = None,
    dtype: str | None = None,
    header: int | None = None,
    sample: str | None = None,
    max_length: int | None = None,
    columns: Sequence[str] | None = None,
    mean: Any = None,
    std: Any = None,
    layout: str | None = None,
    transform: Any = None,
    collate_fn: Any = None,
    cache: str | os.PathLike | None = None,
    io: str = "auto",
) -> Corpus:
    """Open training data without copying it; headers, sizes, shapes and dtypes are checked here, values as they stream.

    Args:
        source: one of

            * arrays: a tensor or numpy array (S, …), or a tuple, list or dict of them;
            * npy: a path to an ``.npy`` file of pixels or floats, its labels in ``labels``, or both paths in a tuple;
            * tokens: a path to a flat file of uint16 or uint32 tokens (nanoGPT, llm.c 1 and 7, one-dimensional
              ``.npy``), with ``window``;
            * megatron: a path to ``P.idx`` or ``P.bin`` of Megatron, NeMo or GPT-NeoX;
            * olmo: a path to ``part.npy`` of OLMo and dolma, which is no NPY file, its documents in ``part.csv.gz``;
            * datatrove: a path to ``X.ds``, its ends in ``X.ds.index``;
            * arrow: the folder of a dataset that Hugging Face's ``save_to_disk`` wrote, or a path to an Arrow stream;
            * idx: a path to an IDX file, ``.gz`` too, its labels in ``labels``, or a folder with MNIST's training pair;
            * cifar: a path to a binary CIFAR file, or a folder with the training ones;
            * dataset: any map-style torch Dataset or sequence of samples, read one by one.

            A list of paths of one format, a pattern (``"part-*.bin"``) or a folder with files of one kind is one
            corpus, but two ``.npy`` or IDX files in a list are features and labels, and arrays in a folder want a
            pattern; a pattern's and a folder's files are sorted by name, as text: ``part-10`` before ``part-2``. Token
            files without a single window add no sample, which is logged, and in the description.
            A corpus that is open already is handed back.
        format: one of these names, where the source alone does not tell.
        labels: (S,) integers: a path to ``.npy`` or IDX, or an array; delivered as int64. Of several files they count
            through all.
        window, stride, dtype, header: of token files; see :class:`TokenCorpus`.
        sample, max_length: of documents; see :class:`MegatronCorpus` and :class:`DocumentCorpus`.
        columns: of a dataset, by name; see :class:`ArrowCorpus`.
        mean, std, layout: of pixels, which uint8 in a file is read as: delivered as ``(x / 255 - mean) / std`` in
            float32, where arrays in memory stay as they are; see :class:`Pixels`. ``dtype`` is what pixels come as.
        transform: callable on each decoded batch; it returns a batch of as many samples.
        collate_fn: how a dataset's samples are joined; default as DataLoader does, dicts padded.
        cache: folder for unpacked IDX files.
        io: how files are read: ``"map"``, ``"read"``, or ``"auto"``, which tries both on the first blocks, and reads
            what lies behind a network; ``describe()`` says which and why.

    Returns:
        Corpus: with ``len``, ``read(start, stop)``, ``corpus[i]``, ``fingerprint``, ``describe()``, ``locate(i)``.

    Raises:
        FileNotFoundError: no such file.
        DamagedFile: a file that is not what its header or name promises.
        ValueError, TypeError: an argument that does not fit, named, with what was wanted and what was given.
    """
    given = {
        "labels": labels, "window": window, "stride": stride, "dtype": dtype, "header": header,
        "sample": sample, "max_length": max_length, "columns": columns,
        "mean": mean, "std": std, "layout": layout, "collate_fn": collate_fn, "cache": cache,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    if isinstance(source, Corpus):
        others = {"transform": transform, "io": None if io == "auto" else io}
        _require_no_options({**given, **{name: v for name, v in others.items() if v is not None}}, format)
        return source
    if format is not None and format not in FORMATS:
        raise ValueError(f"format: wanted one of {sorted(FORMATS)} or None, got {format!r}")
    reading = Reading(io)
    with adopting(reading):
        corpus = _opened(source, format, given, transform)
    if reading.files:
        corpus.reading = reading
    elif io != "auto":
        raise ValueError(f"io: wanted 'auto', for the format {corpus.format!r} reads no files, got {io!r}")
    return corpus


def _opened(source: Any, format: str | None, given: dict[str, Any], transform: Any) -> Corpus:
    paths = _files(source, format, given)
    if paths is not None:
        parts, short = _parts(paths, format, {name: value for name, value in given.items() if name != "labels"})
        return JoinedCorpus(_labelled(parts, given), transform, short)
    name = format or recognise(source, given)
    source, given = _labels_apart(source, name, given)
    for option in given:
        _require_taken(option, given, name)
    return FORMATS[name](source, **given, transform=transform)


def _require_taken(option: str, given: dict[str, Any], format: str) -> None:
    if option not in OPTIONS[format]:
        takes = f"the format {format!r} takes {sorted(OPTIONS[format]) or 'no options'}"
        raise ValueError(f"{option}: wanted None, for {takes}, got {reprlib.repr(given[option])}")


def _labelled(parts: list[Corpus], given: dict[str, Any]) -> list[Corpus]:
    """Files that are one corpus together, each with its share of labels that count through all of them."""
    if "labels" not in given:
        return parts
    for part in parts:
        _require_taken("labels", given, part.format)
    labels, starts = map_labels(given["labels"], given.get("cache")), np.cumsum([0, *map(len, parts)])
    if not isinstance(labels, MappedArray):
        require_label_array(labels)
    if labels.shape[0] != starts[-1]:
        wanted = f"{starts[-1]} labels, one a row of {len(parts)} files together"
        raise ValueError(f"labels: wanted {wanted}, got {labels.shape[0]}")
    return [part.labelled(labels[a:b]) for part, (a, b) in zip(parts, pairwise(starts), strict=True)]


def _parts(paths: list[str], format: str | None, given: dict[str, Any]) -> tuple[list[Corpus], list[tuple[str, int]]]:
    """The files that are one corpus together, and the names and tokens of those that are too short for a window."""
    parts, short = [], []
    for path in paths:
        try:
            parts.append(_opened(path, format, given, None))
        except NoWindow as error:
            short += error.files
    if short and not parts:
        name, tokens = max(short, key=lambda file: file[1])
        wanted = f"at most {tokens} (the tokens in {name}, the longest of {len(short)} files)"
        raise NoWindow(f"window: wanted {wanted}, got {given.get('window')}", short)
    if short:
        log.warning("%d of %d files hold no window: %s …", len(short), len(paths), short[0][0])
    return parts, short


def _files(source: Any, format: str | None, given: dict[str, Any]) -> list[str] | None:
    """The files that are one corpus together; None where the source is one of its own, (features, labels) too."""
    if is_path(source) and os.path.isdir(source):
        return _folder(source, format, given)
    paths = paths_of(source)
    if paths is None or not isinstance(source, list) or any(map(os.path.isdir, paths)):
        return paths
    pair = len(source) == 2 and "labels" not in given and (format or recognise(source, given)) in ("npy", "idx")
    return None if pair else paths


def _folder(source: Any, format: str | None, given: dict[str, Any]) -> list[str] | None:
    """The files of a folder that is no source of its own, as MNIST's is."""
    found = cifar_files(source) if format in (None, "cifar") else []
    if found or own_folder(source) is not None or format == "idx":
        return found or None
    found = folder_files(source, "window" in given)
    if not found:
        where = os.fspath(source)
        arrays = glob(os.path.join(escape(where), "*.npy"))
        hint = f"; its arrays want a pattern: {os.path.join(where, '*.npy')!r}" if arrays else ""
        raise FileNotFoundError(f"source: wanted a folder with data files, got {where!r}, which holds none known{hint}")
    return found


def _require_no_options(given: dict[str, Any], format: str | None) -> None:
    if given or format is not None:
        raise ValueError(
            f"source: wanted no options beside a corpus that is open already, got {sorted(given) or format}"
        )


def _labels_apart(source: Any, name: str, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Take ``(features, labels)`` apart, where both are paths, and map the labels."""
    if name in ("npy", "idx"):
        if isinstance(source, (tuple, list)):
            if len(source) != 2 or not all(map(is_path, source)) or "labels" in given:
                raise ValueError(f"source: wanted a path, or the paths (features, labels), got {source!r}")
            source, given = source[0], {**given, "labels": source[1]}
        if "labels" in given:
            given = {**given, "labels": map_labels(given["labels"], given.get("cache"))}
    if name not in ("arrays", "dataset") and not is_path(source):
        hint = "; files of one format go in a list" if isinstance(source, tuple) else ""
        raise TypeError(f"source: wanted a path for the format {name!r}, got {type(source).__name__}{hint}")
    return source, given
