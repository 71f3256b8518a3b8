"""Rows of a tensor by their numbers, a slice for each run of numbers that follow each other.

An index made of a list comes from the CPU: a GPU is waited for, and a recording of its launches refuses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["gathered", "picked", "runs"]

SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32}


def runs(numbers: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Of each run where it stands among the numbers, and the rows that it names."""
    first = 0
    for last in range(1, len(numbers) + 1):
        if last == len(numbers) or numbers[last] != numbers[last - 1] + 1:
            yield slice(first, last), slice(numbers[first], numbers[last - 1] + 1)
            first = last


def gathered(x: Tensor, rows: Any) -> Tensor:
    """``x[rows]`` for an array of numbers; of unsigned integers too, of which torch has no such kernel on every device
    and in every version."""
    signed = SIGNED.get(x.dtype)
    return x[rows] if signed is None else x.view(signed)[rows].view(x.dtype)


def picked(x: Tensor, numbers: Sequence[int]) -> Tensor:
    """``x[numbers]``, a view of them where they are one run."""
    parts = [x[rows] for _, rows in runs(numbers)]
    return parts[0] if len(parts) == 1 else torch.cat([x[:0], *parts])
