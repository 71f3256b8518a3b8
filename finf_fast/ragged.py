"""Texts of different lengths without paying for padding: a window's samples sorted by length and cut into forwards.

The order in which samples are scored is free, so a window of many forwards is sorted, each forward takes neighbours
and is cut to its longest sample, and scores go back to their samples' places. Padding to the longest of a batch as the
samples come wastes 42 to 96 % of a forward; sorted in a window of 64 forwards it wastes 2 or 3 %.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from finf_fast.loss import CrossEntropy, Loss
from finf_fast.loss.base import LABEL_KEYS
from finf_fast.records import Part
from finf_fast.runs import gathered

__all__ = ["FORWARDS", "lengths", "parts", "width"]

FORWARDS = 64  # forwards a window; beyond it the last percent of padding costs memory and a longer loss at a crash
WASTE = 1 / 32  # padding that a forward may take where it could end earlier
ENOUGH = 4  # a forward of a quarter of what memory holds is as fast, a token, as a full one
MASK = "attention_mask"


def width(batch: Any, loss: Loss) -> int:
    """Tokens L of a padded batch whose columns of padding may be cut without changing what it means; 0 for others.

    They may be where a dict's ``attention_mask`` (B, L) says which tokens are there, all else has a row of tokens
    or one number a sample, and the loss is one that counts tokens by their labels.
    """
    if not isinstance(loss, CrossEntropy) or not isinstance(batch, Mapping) or MASK not in batch:
        return 0
    known = all(isinstance(x, Tensor) and (x.dim() == 1 or _is_row(x)) for x in batch.values())
    return batch[MASK].shape[1] if known and _is_row(batch[MASK]) else 0


def lengths(batch: Mapping[str, Tensor], loss: Loss) -> Tensor:
    """(B,) int64: the last column in which a sample has a token or a label, and one; at least 1."""
    mask = batch[MASK]
    there = mask != 0
    for key in LABEL_KEYS:
        if key in batch and batch[key].shape == mask.shape:
            # Of a narrow type torch would take what does not fit, -100 of uint8, for what is left of it: 156.
            there = there | (batch[key].long() != loss.ignore_index)
    columns = torch.arange(1, mask.shape[1] + 1)
    return (there * columns).amax(1).clamp_(min=1)


def parts(
    read: Part, loss: Loss, size: int, tokens: int | None, multiple: int = 1, placed: Any = None
) -> Iterator[Part]:
    """The forwards of what was read of one window, shortest samples first.

    Args:
        read: samples, padded to their longest, as :func:`width` takes them.
        loss: says which labels do not count.
        size: samples a forward, at most.
        tokens: tokens a forward, padding counted, at most; one sample longer than that is a forward of its own.
        multiple: of the columns of a forward, as far as those read suffice: lengths count as rounded up to it.
        placed: the batch where forwards are to be, on a device that lengths need not be asked of; None for ``read``'s.
    """
    placed = read.batch if placed is None else placed
    found = lengths(read.batch, loss)
    found, order = found.sort(stable=True)
    columns = placed[MASK].shape[1]
    there = order.to(placed[MASK].device)
    found = ((found + multiple - 1) // multiple * multiple).clamp_(max=columns)
    for first, last in _cuts(found.tolist(), size, tokens):
        longest = int(found[last - 1])
        batch = {key: _short(gathered(x, there[first:last]), columns, longest) for key, x in placed.items()}
        yield Part(read.rows[order[first:last]], batch)


def _cuts(found: list[int], size: int, tokens: int | None) -> Iterator[tuple[int, int]]:
    """First and one past last of each forward, of ascending lengths."""
    first = there = 0
    for i, length in enumerate(found):
        if i > first and _is_full(i - first, there, length, size, tokens):
            yield first, i
            first = i
            there = 0
        there += length
    if first < len(found):
        yield first, len(found)


def _is_full(samples: int, there: int, length: int, size: int, tokens: int | None) -> bool:
    """Whether one more sample, of this length, is too many, or is so much longer that it had better begin anew."""
    padded = (samples + 1) * length
    large = samples >= size // ENOUGH if tokens is None else samples * length >= tokens // ENOUGH
    wasteful = large and padded - there - length > padded * WASTE
    return samples == size or wasteful or (tokens is not None and padded > tokens)


def _short(x: Tensor, columns: int, longest: int) -> Tensor:
    return x[:, :longest] if _is_row(x) and x.shape[1] == columns else x


def _is_row(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 2 and not x.is_floating_point() and not x.is_complex()
