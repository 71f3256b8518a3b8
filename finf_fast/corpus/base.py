"""What every corpus can do: count its samples, read a row range as a batch, name a sample, and say what it is.

A format fills in a few small methods; bounds, the user's transform, the fingerprint and the description are here, once.
"""

from __future__ import annotations

import hashlib
import json
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from finf_fast.corpus.collate import joined
from finf_fast.corpus.reading import Reading

if TYPE_CHECKING:
    from finf_fast.corpus.files import MappedFile
    from finf_fast.corpus.undecoded import Undecoded

__all__ = ["Corpus", "runs_of"]


class Corpus(ABC):
    """Samples ``0 … S-1``, each with an index that never changes, read in ranges as batches of CPU tensors.

    A batch is a tensor, a tuple of tensors or a dict of tensors, every one with the leading dimension B.

    Attributes:
        format: which of the formats it is, as :func:`finf_fast.open_corpus` names them; ``"files"`` for several files.
        transform: the callable applied to every batch after decoding, or None.
        reading: how its files are read; None without files.
    """

    format: ClassVar[str]
    reading: Reading | None = None

    def __init__(self, samples: int, transform: Callable[[Any], Any] | None = None, file: MappedFile | None = None):
        if samples < 1:
            where = "" if file is None else f" in {file.name}"
            raise ValueError(f"source: empty corpus, wanted at least 1 sample{where}, got 0")
        if transform is not None and not callable(transform):
            raise TypeError(f"transform: wanted a callable (batch) -> batch, got {type(transform).__name__}")
        self._samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return self._samples

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.format!r}: {len(self)} samples>"

    def read(self, start: int, stop: int) -> Any:
        """Decode samples ``[start, stop)`` into one batch, leading dimension ``stop - start``.

        Raises:
            IndexError: the range is empty or not inside ``[0, S)``.
            DamagedFile: a file no longer holds these rows.
            ValueError: the transform returned another number of samples.
        """
        start, stop = operator.index(start), operator.index(stop)
        if not 0 <= start < stop <= self._samples:
            raise IndexError(f"start, stop: wanted 0 <= start < stop <= {len(self)} (samples), got {start}, {stop}")
        batch = self._rows(start, stop)
        return batch if self.transform is None else self._transformed(batch, stop - start)

    def take(self, indices: Any) -> Any:
        """Decode samples in the order of their indices into one batch, leading dimension B.

        Args:
            indices: (B,) integers in ``[0, S)``, in any order, repeated ones too: a sequence, an array or a tensor.

        Raises:
            IndexError: no indices, or one that is not inside ``[0, S)``.
            TypeError: not one dimension of integers.
            DamagedFile, ValueError: as :meth:`read`.
        """
        found = np.asarray(indices)
        if found.size and (found.ndim != 1 or found.dtype.kind not in "iu"):
            raise TypeError(f"indices: wanted one dimension of integers, got {found.dtype} {found.shape}")
        wrong = found[(found < 0) | (found >= len(self))]
        if not found.size or wrong.size:
            got = wrong[0] if wrong.size else "none"
            raise IndexError(f"indices: wanted 0 <= index < {len(self)} (samples), got {got}")
        batch = self._taken(found.astype(np.int64))
        return batch if self.transform is None else self._transformed(batch, len(found))

    def lengths(self, start: int, stop: int) -> Any:
        """(stop - start,) int64 tokens of these samples, where they differ; None where all have one shape."""
        return None

    def undecoded(self) -> Undecoded | None:
        """The same samples with pixels or tokens as stored, and what decodes them, on any device, to the same bits.

        None where nothing is decoded, and where a transform waits for what is.
        """
        return None

    def __getitem__(self, index: int) -> Any:
        """One sample, decoded: the batch of one without its leading dimension; a negative index counts from the end."""
        index = self._position(index)
        return tree_map(operator.itemgetter(0), self.read(index, index + 1))

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits, equal whenever format, content and decoding settings are; computed at the first look.

        A transform enters by its name only, for a function's meaning cannot be hashed. Files and arrays up to 64 MiB
        are hashed in full; beyond that, samples of the content are, with the file's size and time of change.
        """
        hasher = hashlib.blake2b(digest_size=16)
        hasher.update(json.dumps(self._identity(), sort_keys=True).encode())
        self._digest(hasher)
        return hasher.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Everything a person or a manifest wants to know, ready for JSON; shapes and dtypes are those of sample 0."""
        first = self.read(0, 1)
        return {
            **self._identity(),
            "paths": self._paths(),
            "shapes": tree_map(lambda t: list(t.shape[1:]), first),
            "dtypes": tree_map(lambda t: str(t.dtype).removeprefix("torch."), first),
            **self._notes(),
            **({} if self.reading is None else self.reading.describe()),
        }

    def locate(self, index: int) -> str:
        """Where a sample lives, for an error message: ``"train.bin, byte 34816"`` or ``"sample 17"``."""
        return self._place(self._position(index))

    def _transformed(self, batch: Any, rows: int) -> Any:
        batch = self.transform(batch)
        require_rows(batch, rows, "transform")
        return batch

    def _identity(self) -> dict[str, Any]:
        name = None if self.transform is None else callable_name(self.transform)
        return {"format": self.format, "samples": len(self), "transform": name, **self._settings()}

    def _position(self, index: int) -> int:
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"index: wanted {-len(self)} <= index < {len(self)} (samples), got {position}")
        return position % len(self)

    @abstractmethod
    def _rows(self, start: int, stop: int) -> Any:
        """Decode rows ``[start, stop)``, already checked, before the transform."""

    def _taken(self, indices: np.ndarray) -> Any:
        """Decode rows in any order, int64 and checked, before the transform; formats do better where they can."""
        return joined([self._rows(start, stop) for start, stop in runs_of(indices)])

    def _lengths_of(self, indices: np.ndarray) -> np.ndarray | None:
        """:meth:`lengths` of rows in any order, int64 and checked; formats do better where they can."""
        found = [self.lengths(start, stop) for start, stop in runs_of(indices)]
        return None if found[0] is None else np.concatenate(found)

    def _digest(self, hasher: Any) -> None:
        """Feed the content, or a fair sample of it, to a hashlib object."""
        for file in self._files():
            file.digest(hasher)
        for part in self._memory():
            hasher.update(part.fingerprint.encode())

    def _memory(self) -> list[Corpus]:
        """What samples are made of that no file holds: labels given as an array."""
        return []

    def _files(self) -> list[MappedFile]:
        """Every file that a sample is made from."""
        return []

    def _settings(self) -> dict[str, Any]:
        """Settings that change what a sample decodes to; part of the fingerprint."""
        return {}

    def _paths(self) -> list[str]:
        """File names as the user gave them; not part of the fingerprint, for data may move."""
        return [file.name for file in self._files()]

    def _like(self) -> Any:
        """What the samples of several files must have in common to be one corpus, besides the format."""
        return None

    def _notes(self) -> dict[str, Any]:
        """Whatever else is worth saying in the description."""
        return {}

    def _place(self, index: int) -> str:
        return f"sample {index}"


def runs_of(indices: np.ndarray) -> list[tuple[int, int]]:
    """First and one past last of the consecutive runs that (B,) indices consist of, in their order."""
    ends = np.append(np.flatnonzero(np.diff(indices) != 1), len(indices) - 1)
    starts = np.append(0, ends[:-1] + 1)
    return list(zip(indices[starts].tolist(), (indices[ends] + 1).tolist(), strict=True))


def tree_map(function: Callable[[torch.Tensor], Any], batch: Any) -> Any:
    """Apply a function to every tensor of a batch; a dict stays a dict, a list becomes a tuple."""
    if isinstance(batch, torch.Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: tree_map(function, value) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(tree_map(function, value) for value in batch)
    raise TypeError(f"batch: wanted tensors, or a tuple or dict of tensors, got {type(batch).__name__}")


def require_rows(batch: Any, rows: int, argument: str) -> None:
    """Check that every tensor a user's callable returned has the leading dimension that went in."""

    def check(tensor: torch.Tensor) -> None:
        if tensor.ndim == 0 or tensor.shape[0] != rows:
            raise ValueError(f"{argument}: wanted {rows} samples back, got shape {tuple(tensor.shape)}")

    try:
        tree_map(check, batch)
    except TypeError as error:
        raise TypeError(f"{argument}: wanted a batch of tensors back; {error}") from None


def callable_name(function: Callable) -> str:
    """Module and name of a function, or the class of an object that is called; never an address in memory."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"
