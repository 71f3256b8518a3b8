"""Samples as they are stored: fewer bytes cross to a device, and are decoded there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from finf_fast import ops
from finf_fast.loss import mapped
from finf_fast.ops.decode_tokens import STORED

if TYPE_CHECKING:
    from finf_fast.corpus.base import Corpus

__all__ = ["Undecoded", "is_narrow", "tokens_apart"]


class Undecoded(NamedTuple):
    """A corpus whose batches are as stored, and what makes of one, on any device, the batch that there would have been.

    Attributes:
        corpus: the same samples.
        decode: batch -> batch, the bits of one that was decoded as it was read.
        kind: ``"pixels"`` or ``"tokens"``; the operation is ``decode_<kind>``.
        alike: what several files have to have in common to be decoded as one.
    """

    corpus: Corpus
    decode: Callable[[Any], Any]
    kind: str
    alike: Any


def is_narrow(dtype: np.dtype, fill: int = 0) -> bool:
    """Whether integers stored so take less than int64 does, and can say what fills up the shorter rows."""
    return dtype.kind in "iu" and dtype.itemsize < 8 and np.iinfo(dtype).min <= fill


def tokens_apart(corpus: Any, dtypes: Sequence[np.dtype]) -> Undecoded | None:
    """:meth:`Corpus.undecoded` of one that is told by its ``_as_stored`` to leave integers of these dtypes alone."""
    if corpus.transform is not None or not any(map(is_narrow, dtypes)):
        return None
    stored = copy.copy(corpus)
    stored._as_stored = True
    return Undecoded(stored, _widened, "tokens", [dtype.name for dtype in dtypes])


def _widened(batch: Any) -> Any:
    return mapped(lambda x: ops.decode_tokens(x) if x.dtype in STORED else x, batch)
