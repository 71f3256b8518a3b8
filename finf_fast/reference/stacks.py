"""What the faces in plain torch of the stacked operations share: leading sizes, dtype of the arithmetic, pieces."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["arithmetic", "pieces", "queries", "split"]


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype inside: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def queries(*stacks: Tensor | None, changes: tuple[Tensor | None, ...] = ()) -> int:
    """Q of stacks (1+Q, ...) and parameter changes (Q, ...); 0 where nothing changes."""
    moved = [len(x) - 1 for x in stacks if x is not None and len(x) > 1]
    return next(iter(moved + [len(x) for x in changes if x is not None]), 0)


def split(stack: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(value (1, ...), changes (Q, ...)) in `dtype`; no changes where the stack stands alone."""
    x = stack.to(dtype)
    return x[:1], x[1:]


def pieces(size: int, cost: int, budget: int) -> Iterator[slice]:
    """Slices of range(size) whose cost (per index) stays within the budget; at least one index each."""
    step = max(1, budget // max(1, cost))
    return (slice(a, min(a + step, size)) for a in range(0, size, step))
