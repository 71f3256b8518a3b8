"""The border checks that only the stacked operations share: leading sizes of stacks and of parameters' changes;
and what a compiled face is told of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from finf_fast.ops.border import rows

__all__ = ["address", "check_stack", "parameter", "stack_of_rows", "stacked_queries", "told"]


def check_stack(name: str, x: Tensor, shape: Sequence[int] | None = None) -> None:
    """ValueError unless `x` is a value and any number of changes (1+Q, ...), with these sizes behind where given."""
    if x.dim() < 1 or x.shape[0] < 1:
        raise ValueError(f"{name}: wanted a stack (1+Q, ...) of a value and its changes, got shape {tuple(x.shape)}")
    if shape is not None and tuple(x.shape[1:]) != tuple(shape):
        wanted = ", ".join(["1+Q", *map(str, shape)])
        raise ValueError(f"{name}: wanted shape ({wanted}), got {tuple(x.shape)}")


def stacked_queries(stacks: Mapping[str, Tensor | None], changes: Mapping[str, Tensor | None] | None = None) -> int:
    """Q of stacks (1+Q, ...) and parameters' changes (Q, ...), 0 where nothing changes.

    A stack of leading size 1 has not changed and goes with any Q. ValueError names the argument that differs.
    """
    # Not len(x), which is a function of torch's in Python: a microsecond a time, in every operation of a net.
    counts = {name: x.shape[0] - 1 for name, x in stacks.items() if x is not None and x.shape[0] > 1}
    if changes:
        counts |= {name: x.shape[0] for name, x in changes.items() if x is not None and x.dim()}
    for name, Q in counts.items():
        first, wanted = next(iter(counts.items()))
        if wanted != Q:
            raise ValueError(f"{name}: wanted Q = {wanted} queries, as {first} has, got {Q}")
    return next(iter(counts.values()), 0)


def stack_of_rows(stack: Tensor | None, D: int) -> Tensor | None:
    """A stack as (1+Q, N, D) whose rows have no gaps; copied only where its strides allow no such view."""
    return None if stack is None else rows(stack.reshape(stack.shape[0], stack.shape[1:].numel() // max(D, 1), D))


def told(x: Tensor | None) -> tuple[int, int, int, bool]:
    """Address of a stack of rows, distances of its queries and of its rows, whether it moves; 0 if there is none."""
    return (0, 0, 0, False) if x is None else (x.data_ptr(), x.stride(0), x.stride(1), x.shape[0] > 1)


def parameter(x: Tensor | None) -> Tensor | None:
    """A parameter as contiguous float32, which is small beside a stack."""
    return None if x is None else x.to(torch.float32).contiguous()


def address(x: Tensor | None) -> int:
    """Where its numbers lie, 0 if there are none."""
    return 0 if x is None else x.data_ptr()
