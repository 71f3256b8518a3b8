"""The strongest samples of each query, kept while scores stream by: K places a query, however many samples pass."""

from __future__ import annotations

import operator
from typing import Any

import torch

from finf_fast import ops
from finf_fast.records import TopK

TAILS = ("helpful", "harmful", "both")


class RunningTop:
    """A running top-k over blocks of influence.

    Sorted by strength; of equals the smaller corpus index is first; NaN is never kept. The result does not depend on
    how the samples are cut into blocks, or on their order.

    Args:
        queries: Q.
        k: places a query, at least 1. Memory is Q·k, twice that for "both".
        tail: "helpful" keeps the largest influence, "harmful" the smallest, "both" the largest in absolute value.
        dtype: of the influence, float32 or float64.
        device: where the blocks are.

    Raises:
        ValueError, TypeError: an argument is not as above.
    """

    def __init__(
        self,
        queries: int,
        k: int,
        tail: str = "helpful",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if queries < 1:
            raise ValueError(f"queries: wanted at least 1, got {queries}")
        self.k = check_k(k)
        self.tail = check_tail(tail)
        # The strongest k of both tails are among the k most helpful and the k most harmful.
        self._signs = {"helpful": (1,), "harmful": (-1,), "both": (1, -1)}[tail]
        self._places = [
            (
                torch.full((queries, self.k), -torch.inf, dtype=dtype, device=device),
                torch.full((queries, self.k), -1, dtype=torch.int64, device=device),
            )
            for _ in self._signs
        ]

    def add(self, influence: torch.Tensor, start: int) -> None:
        """Takes the next block: influence (Q,b), positive = helpful; its first column is sample ``start``."""
        for sign, (values, indices) in zip(self._signs, self._places, strict=True):
            ops.topk_merge_(values, indices, influence if sign > 0 else -influence, start)

    def result(self, query: int = 0) -> TopK:
        """The strongest samples of one query so far: at most k, fewer when fewer were seen."""
        values = torch.cat([sign * values[query] for sign, (values, _) in zip(self._signs, self._places, strict=True)])
        indices = torch.cat([indices[query] for _, indices in self._places])
        filled = indices >= 0
        values, indices = values[filled], indices[filled]
        if self.tail == "both":
            values, indices = strongest(values, indices, self.k)
        return TopK(indices.cpu().numpy(), values.cpu().numpy())


def strongest(values: torch.Tensor, indices: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest in absolute value, each sample once, of equals the smaller index first."""
    by_index = torch.argsort(indices, stable=True)
    values, indices = values[by_index], indices[by_index]
    fresh = torch.ones_like(indices, dtype=torch.bool)
    fresh[1:] = indices[1:] != indices[:-1]
    values, indices = values[fresh], indices[fresh]
    order = torch.argsort(values.abs(), descending=True, stable=True)[:k]
    return values[order], indices[order]


def check_k(k: int) -> int:
    try:
        k = operator.index(k)
    except TypeError as err:
        raise TypeError(f"k: wanted a whole number, got {k!r}") from err
    if k < 1:
        raise ValueError(f"k: wanted at least 1, got {k}")
    return k


def check_tail(tail: Any) -> str:
    if tail not in TAILS:
        raise ValueError(f"tail: wanted one of {TAILS}, got {tail!r}")
    return tail
