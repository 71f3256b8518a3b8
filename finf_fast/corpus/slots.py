"""Memory of batches, used again: a slot comes back when the last tensor that looks at it is gone, never before.

Whoever holds a batch, or a view of one, holds its slot (csrc/io/slots.h); the next batch then gets another.
"""

from __future__ import annotations

import math

import torch

from finf_fast.corpus.compiled import compiled

__all__ = ["Slots"]

SMALL = 1 << 17  # bytes that the allocator hands out again by itself, without new pages
KEPT = 10  # slots that wait at most: as many blocks are under way in a sweep (eight staged, one let go, one at work)
KEPT_BYTES = 256 << 20  # together at most: four windows of the largest that staging plans


class Slots:
    """The slots of one corpus; safe to use from several threads."""

    def __init__(self):
        loops = compiled()
        self._lent = None if loops is None else loops.Slots(KEPT, KEPT_BYTES)

    def __reduce__(self):
        return Slots, ()  # what waits holds nothing that a copy needs

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, strides: tuple[int, ...] | None = None) -> torch.Tensor:
        """A tensor on the CPU with nothing in it yet, pinned in a process that uses CUDA.

        Args:
            shape, dtype: as of :func:`torch.empty`.
            strides: in numbers, without gaps in any order of the dimensions; None for those of a contiguous tensor.
        """
        items = math.prod(shape)
        count = items * dtype.itemsize
        if torch.cuda.is_initialized():
            # torch keeps slots of its own here, and knows until when a copy to the device still reads from one.
            flat = torch.empty(items, dtype=dtype, pin_memory=True)
        elif self._lent is None or count < SMALL:
            flat = torch.empty(items, dtype=dtype)
        else:
            flat = torch.frombuffer(self._lent.lend(count), dtype=dtype, count=items)
        return flat.view(shape) if strides is None else flat.as_strided(shape, strides)
