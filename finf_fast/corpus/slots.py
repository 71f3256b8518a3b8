"""Memory of batches, used again: a slot comes back when the last tensor that looks at it is gone, never before.

A batch of many megabytes in new memory costs more for the system's zeroing of its pages than for its bytes. Whoever
holds a batch, or a view of one, holds its slot; the next batch then gets another.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import torch

__all__ = ["Slots"]

SMALL = 1 << 17  # bytes that the allocator hands out again by itself, without new pages
KEPT = 10  # slots that wait at most: as many blocks are under way in a sweep (eight staged, one let go, one at work)
KEPT_BYTES = 256 << 20  # together at most: four windows of the largest that staging plans
ALIGNMENT = 64  # a cache line, and the widest vector


class Slots:
    """The slots of one corpus; safe to use from several threads."""

    def __init__(self):
        # Only single operations of a deque, which are atomic: slots come back from any thread, even in the middle of
        # `empty`, when garbage is collected there.
        self._waiting: deque[np.ndarray] = deque()

    def __reduce__(self):
        return Slots, ()  # what waits holds nothing that a copy needs

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor on the CPU with nothing in it yet, pinned in a process that uses CUDA."""
        if torch.cuda.is_initialized():
            # torch keeps slots of its own here, and knows until when a copy to the device still reads from one.
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        items = math.prod(shape)
        count = items * dtype.itemsize
        if count < SMALL:
            return torch.empty(shape, dtype=dtype)
        memory = self._found(count)
        lent = (_aligned(count) if memory is None else memory).view(_Lease)
        lent.waiting = self._waiting
        return torch.frombuffer(lent, dtype=dtype, count=items).view(shape)

    def _found(self, count: int) -> np.ndarray | None:
        """A slot that waits, large enough and not wastefully so."""
        for _ in range(len(self._waiting)):
            try:
                memory = self._waiting.popleft()
            except IndexError:
                return None
            if count <= memory.nbytes <= 4 * count:
                return memory
            _take_back(self._waiting, memory)
        return None


class _Lease(np.ndarray):
    """A view of a slot that a batch's tensors are made of: its end is the end of the last of them."""

    waiting: deque[np.ndarray]

    def __del__(self):
        _take_back(self.waiting, self.view(np.ndarray))


def _aligned(count: int) -> np.ndarray:
    memory = np.empty(count + ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % ALIGNMENT
    return memory[first : first + count]


def _take_back(waiting: deque[np.ndarray], memory: np.ndarray) -> None:
    if memory.nbytes > KEPT_BYTES:
        return
    waiting.append(memory)
    while len(waiting) > KEPT or sum(slot.nbytes for slot in tuple(waiting)) > KEPT_BYTES:
        try:
            waiting.popleft()
        except IndexError:  # another thread took it
            return
