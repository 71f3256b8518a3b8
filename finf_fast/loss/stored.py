"""The check of tokens as they are stored: only rows in doubt are made what the loss's own check reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finf_fast.loss.base import LABEL_KEYS, Loss, batch_size, mapped
from finf_fast.loss.entropy import TOKEN_KEYS, CausalLM, CrossEntropy, MaskedLM, Seq2Seq
from finf_fast.records import BadSample

__all__ = ["check_stored", "is_served"]

# Their checks refuse nothing in a row whose ids and labels are all in range. Of a subclass, nobody knows.
BY_RANGE = (CrossEntropy, CausalLM, MaskedLM, Seq2Seq)


def is_served(loss: Loss) -> bool:
    """Whether :func:`check_stored` finds all that the loss's own check would find."""
    return type(loss) in BY_RANGE or type(loss).check is Loss.check


def check_stored(loss: Loss, batch: Any, outputs: int | None, vocabulary: int | None) -> None:
    """As ``loss.check`` of the batch with its integers, of any width, as int64.

    Args:
        loss: as :func:`is_served` has it.

    Raises:
        BadSample, and what ``loss.check`` raises.
    """
    if type(loss).check is Loss.check:
        return
    limits = [n for n in (outputs, vocabulary) if n is not None]
    rows = np.flatnonzero(_in_doubt(loss, batch, min(limits)) if limits else _first(batch))
    try:
        loss.check(mapped(lambda x: _decoded(x, rows), batch), outputs, vocabulary)
    except BadSample as error:
        raise BadSample(str(error), int(rows[error.row])) from None


def _in_doubt(loss: Loss, batch: Any, limit: int) -> np.ndarray:
    """(B,) bool: rows with an id or a label outside [0, limit), the least of all limits; and the first row."""
    found = _first(batch)
    for numbers, ignored in _columns(loss, batch):
        if not numbers.size or (int(numbers.max()) < limit and (numbers.dtype.kind == "u" or int(numbers.min()) >= 0)):
            continue
        wrong = (numbers < 0) | (numbers >= limit)
        if ignored is not None:
            wrong &= numbers != ignored
        found |= wrong.reshape(len(found), -1).any(1)
    return found


def _first(batch: Any) -> np.ndarray:
    """(B,) bool: the first row, which shows what is wrong with all."""
    return np.arange(batch_size(batch)) == 0


def _columns(loss: Loss, batch: Any) -> Iterator[tuple[np.ndarray, int | None]]:
    """The integers that checks look at, and which of them does not count: of labels alone there is one."""
    if isinstance(batch, Mapping):
        named = [(x, key) for key, x in batch.items() if key in (*TOKEN_KEYS, *LABEL_KEYS)]
    else:
        named = [(x, None) for x in (batch if isinstance(batch, (tuple, list)) else [batch])]
    for x, key in named:
        if not x.is_floating_point():
            yield x.numpy(), getattr(loss, "ignore_index", None) if key in LABEL_KEYS else None


def _decoded(x: Tensor, rows: np.ndarray) -> Tensor:
    picked = x.numpy()[rows]
    return torch.from_numpy(picked if x.is_floating_point() else picked.astype(np.int64))
