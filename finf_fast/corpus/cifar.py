"""The binary CIFAR-10 and CIFAR-100: records of one or two label bytes and 3,072 bytes of pixels, planes R, G, B.

Source of the layout: Krizhevsky, https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from glob import escape, glob
from typing import Any

import numpy as np
from torch import Tensor

from finf_fast.corpus.base import Corpus
from finf_fast.corpus.delivery import Starts, integers
from finf_fast.corpus.files import MappedArray, MappedFile
from finf_fast.corpus.pixels import Pixels, apart
from finf_fast.corpus.undecoded import Undecoded
from finf_fast.records import DamagedFile

__all__ = ["CifarCorpus", "cifar_files"]

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
HUNDRED = ("train.bin", "test.bin")  # CIFAR-100's names; its records begin with the coarse label


class CifarCorpus(Corpus):
    """Images (B, 3, 32, 32) and labels (B,) int64 of one file; CIFAR-100's labels are the fine ones.

    Args:
        path: of ``data_batch_k.bin`` or ``test_batch.bin``; of ``train.bin`` or ``test.bin`` for CIFAR-100.
        mean, std, dtype: see :class:`finf_fast.corpus.pixels.Pixels`.
        transform: callable on each batch.

    Raises:
        DamagedFile: the file does not hold whole records.
    """

    format = "cifar"

    def __init__(
        self,
        path: str | os.PathLike,
        mean: Any = None,
        std: Any = None,
        dtype: str | None = None,
        transform: Callable[[Any], Any] | None = None,
    ):
        file = MappedFile(path)
        self._labels = 2 if os.path.basename(file.path) in HUNDRED else 1
        record = self._labels + PIXELS
        if file.size % record:
            raise DamagedFile(
                f"{file.name}: wanted whole records of {record} bytes, got {file.size} bytes: it ends inside "
                f"the one at byte {file.size - file.size % record}"
            )
        self._records = MappedArray(file, 0, np.dtype("u1"), (file.size // record, record))
        super().__init__(self._records.shape[0], transform, file)
        self._pixels = Pixels((len(self), *SHAPE), np.dtype("u1"), mean, std, "NCHW", dtype)

    def _rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        record = self._records.shape[1]
        first = self._labels  # the byte of a record with which its picture begins, right after the label wanted
        images, labels = (range(start * record + at, stop * record + at, record) for at in (first, first - 1))
        return self._batch(images, labels)

    def _taken(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        images = indices * self._records.shape[1] + self._labels
        return self._batch(images, images - 1)

    def _batch(self, images: Starts, labels: Starts) -> tuple[Tensor, Tensor]:
        return self._pixels.runs(self._records, images, SHAPE), integers(self._records, labels, 1).view(-1)

    def undecoded(self) -> Undecoded | None:
        """See :meth:`Corpus.undecoded`."""
        return apart(self, self._pixels)

    def _files(self) -> list[MappedFile]:
        return [self._records.file]

    def _settings(self) -> dict[str, Any]:
        return {"label_bytes": self._labels, **self._pixels.settings()}

    def _like(self) -> Any:
        return self._labels

    def _place(self, index: int) -> str:
        return self._records.place(index)


def cifar_files(folder: str | os.PathLike) -> list[str]:
    """The training files in a folder of CIFAR-10 or CIFAR-100 as its archive unpacks, in order; none elsewhere."""
    here = os.fspath(folder)
    batches = sorted(glob(os.path.join(escape(here), "data_batch_*.bin")))
    hundred = [os.path.join(here, name) for name in ("train.bin", "fine_label_names.txt")]
    return batches or (hundred[:1] if all(map(os.path.isfile, hundred)) else [])
