"""The base's products of one batch, kept from the first chunk of queries for those after it.

Where not all queries fit in one stack the model runs once a chunk, and what the base contributes is the same each time.
The costly part of it, the results of linear layers and convolutions, is remembered while there is room. A result is
used again only for the same weight and an input that is equal bit by bit, so a chunk whose queries route the base's
tokens differently computes its own.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Use:
    """One use of some weights in a forward: which ones, and how often they had been used before."""

    weights: tuple[Any, ...]
    key: tuple


class Kept:
    """Results by weight and use.

    Args:
        room: bytes that inputs and results may take.
    """

    def __init__(self, room: int):
        self.room = room
        self.used = 0  # results that were not computed again
        self._found: dict[tuple, tuple[Use, Tensor, Tensor]] = {}
        self._uses: Counter[tuple] = Counter()

    def rewind(self) -> None:
        """A chunk begins."""
        self._uses.clear()

    def find(self, x: Tensor, *weights: Any) -> tuple[Use, Tensor | None]:
        """This use of the weights, and the result for input ``x`` if it is known."""
        place = tuple((w.data_ptr(), w.shape, w.stride()) if isinstance(w, Tensor) else w for w in weights)
        use = Use(weights, (*place, self._uses[place]))
        self._uses[place] += 1
        _, before, result = self._found.get(use.key, (None, None, None))
        if before is None or before.shape != x.shape or not torch.equal(before, x):
            return use, None
        self.used += 1
        return use, result

    def keep(self, use: Use, x: Tensor, result: Tensor) -> None:
        """Remembers a result, copied: what follows may write into it. The weights stay alive, and so their addresses
        their own."""
        need = x.nbytes + result.nbytes
        if use.key not in self._found and need <= self.room:
            self.room -= need
            self._found[use.key] = use, x.clone(), result.clone()

    def clear(self) -> None:
        """Another batch begins."""
        self.room += sum(x.nbytes + y.nbytes for _, x, y in self._found.values())
        self._found.clear()
