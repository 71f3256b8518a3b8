"""Corpus of arrays that are in memory already: batches are views, nothing is copied. What the caller has mapped from a
file for reading is read from there (see :mod:`finf_fast.corpus.mappings`).

Tensors and numpy arrays, alone or in a tuple, list or dict with equal leading lengths. Integers arrive as int64, as
losses and embeddings want them, except uint8 arrays of two or more dimensions (pixels, left as they are).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

from finf_fast.corpus.base import Corpus
from finf_fast.corpus.digest import digest_rows
from finf_fast.corpus.mappings import guarded
from finf_fast.corpus.widen import integers

__all__ = [
    "ArrayCorpus",
    "digest_array",
    "holds_arrays",
    "is_array",
    "owned",
    "require_label_array",
    "widened",
]


def is_array(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, np.ndarray))


def holds_arrays(source: Any) -> bool:
    """Whether a source is an array, a TensorDataset, or a filled tuple, list or dict of nothing but arrays."""
    if type(source) is TensorDataset:  # a subclass may make its samples in its own way
        return True
    if isinstance(source, (tuple, list)):
        return bool(source) and all(map(is_array, source))
    if isinstance(source, Mapping):
        return bool(source) and all(map(is_array, source.values()))
    return is_array(source)


class ArrayCorpus(Corpus):
    """Arrays with the samples along the first dimension.

    Args:
        source: a tensor or numpy array (S, …), or a tuple, list or dict of them; a list is read as a tuple, a
            TensorDataset as the tuple of its tensors.
        labels: (S,) integers to go with a single array.
        transform: callable on each batch; it is given copies, so that it cannot write into the caller's arrays.

    Raises:
        TypeError: something inside is not an array on the CPU, or has a dtype that no model takes.
        ValueError: no samples, no arrays, or leading lengths that differ.
    """

    format = "arrays"

    def __init__(self, source: Any, labels: Any = None, transform: Callable[[Any], Any] | None = None):
        if labels is not None:
            require_label_array(labels)
            source = (_alone(source), labels)
        source = source.tensors if isinstance(source, TensorDataset) else source
        self._source = tuple(source) if isinstance(source, list) else source
        self._arrays = dict(_named(self._source))
        for name, array in self._arrays.items():
            _require_rows(name, array)
        super().__init__(_common_length(self._arrays), transform)
        self._arrays = {name: guarded(array) for name, array in self._arrays.items()}

    def _rows(self, start: int, stop: int) -> Any:
        return self._structured([_deliver(array, slice(start, stop)) for array in self._arrays.values()])

    def _taken(self, indices: np.ndarray) -> Any:
        return self._structured([_deliver(array, indices) for array in self._arrays.values()])

    def _structured(self, tensors: list[torch.Tensor]) -> Any:
        if self.transform is not None:
            tensors = [tensor.clone() for tensor in tensors]
        if isinstance(self._source, Mapping):
            return dict(zip(self._source, tensors, strict=True))
        return tuple(tensors) if isinstance(self._source, tuple) else tensors[0]

    def _digest(self, hasher: Any) -> None:
        for name, array in self._arrays.items():
            digest_array(hasher, name, array)


def digest_array(hasher: Any, name: str, array: torch.Tensor | np.ndarray) -> None:
    """Feed a name, a dtype, a shape and the rows (see :func:`digest_rows`) of an array to a hashlib object."""
    hasher.update(f"{name} {str(array.dtype).removeprefix('torch.')} {tuple(array.shape)}".encode())
    length = len(array)
    digest_rows(hasher, length, array.nbytes // length, lambda start, stop: _bytes(array[start:stop]))


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, integers other than pixels as int64; itself where that changes nothing."""
    widen = _arrives_as_int64(tensor) and tensor.dtype != torch.int64
    return integers(tensor.numpy()) if widen else tensor


def owned(rows: np.ndarray) -> torch.Tensor:
    """A tensor with memory of its own, in this machine's byte order; integers other than pixels become int64."""
    if _arrives_as_int64(rows):
        return integers(rows)
    return torch.from_numpy(np.array(rows, rows.dtype.newbyteorder("="), order="C"))


def require_label_array(labels: Any) -> None:
    """Check labels given in memory: an array or tensor (S,) of integers."""
    if not is_array(labels):
        raise TypeError(f"labels: wanted a path or an array of integers, got {type(labels).__name__}")
    if labels.ndim != 1 or _kind(labels) not in "iu":
        raise ValueError(f"labels: wanted integers of shape (S,), got {labels.dtype} {tuple(labels.shape)}")


def _alone(source: Any) -> Any:
    if not is_array(source):
        raise ValueError(f"labels: wanted only beside a single array, got a source that is a {type(source).__name__}")
    return source


def _named(source: Any) -> list[tuple[str, Any]]:
    if isinstance(source, Mapping):
        return [(f"source[{key!r}]", value) for key, value in source.items()]
    if isinstance(source, tuple):
        return [(f"source[{place}]", value) for place, value in enumerate(source)]
    return [("source", source)]


def _require_rows(name: str, array: Any) -> None:
    if not is_array(array):
        raise TypeError(f"{name}: wanted a tensor or numpy array, got {type(array).__name__}")
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name}: wanted an array without a mask, got a masked array, whose mask would be lost")
    if isinstance(array, torch.Tensor) and (array.layout != torch.strided or array.device.type != "cpu"):
        raise TypeError(f"{name}: wanted a dense tensor on the CPU, got {array.layout} on {array.device}")
    if _kind(array) not in "fiub":
        raise TypeError(f"{name}: wanted floats, integers or bools, got dtype {array.dtype}")
    if array.ndim == 0:
        raise ValueError(f"{name}: wanted samples along a first dimension, got a single number")


def _common_length(arrays: dict[str, Any]) -> int:
    lengths = {name: len(array) for name, array in arrays.items()}
    if not lengths:
        raise ValueError("source: wanted at least one array, got none")
    if len(set(lengths.values())) > 1:
        raise ValueError(f"source: wanted arrays of one leading length, got {lengths}")
    return next(iter(lengths.values()))


def _kind(array: Any) -> str:
    """numpy's letter for the kind of dtype, of a tensor too: f, i, u, b, c or another."""
    if isinstance(array, np.ndarray):
        # torch has no long double.
        return array.dtype.kind if array.dtype.itemsize <= 8 else "V"
    if array.is_floating_point():
        return "f"
    if array.dtype == torch.bool:
        return "b"
    name = str(array.dtype).removeprefix("torch.")
    return name[0] if name.startswith(("int", "uint")) else "V"


def _arrives_as_int64(array: Any) -> bool:
    pixels = str(array.dtype).endswith("uint8") and array.ndim > 1
    return _kind(array) in "iu" and not pixels


def _deliver(array: Any, places: slice | np.ndarray) -> torch.Tensor:
    """Rows as a tensor: a view where torch can look at this memory and may write there, a copy otherwise."""
    rows = array[places]
    if isinstance(rows, torch.Tensor):
        return widened(rows.detach())
    plain = rows.dtype == np.int64 or not _arrives_as_int64(rows)
    viewable = rows.flags.writeable and rows.dtype.isnative and min(rows.strides) >= 0
    return torch.from_numpy(rows) if plain and viewable else owned(rows)


def _bytes(rows: Any) -> np.ndarray:
    if isinstance(rows, torch.Tensor):
        return rows.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return np.ascontiguousarray(rows)
