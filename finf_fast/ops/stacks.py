"""The border checks that only the stacked operations share: leading sizes of stacks and of parameters' changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

__all__ = ["check_stack", "stacked_queries"]


def check_stack(name: str, x: Tensor, shape: Sequence[int] | None = None) -> None:
    """ValueError unless `x` is a value and any number of changes (1+Q, ...), with these sizes behind where given."""
    if x.dim() < 1 or len(x) < 1:
        raise ValueError(f"{name}: wanted a stack (1+Q, ...) of a value and its changes, got shape {tuple(x.shape)}")
    if shape is not None and tuple(x.shape[1:]) != tuple(shape):
        wanted = ", ".join(["1+Q", *map(str, shape)])
        raise ValueError(f"{name}: wanted shape ({wanted}), got {tuple(x.shape)}")


def stacked_queries(stacks: Mapping[str, Tensor | None], changes: Mapping[str, Tensor | None] | None = None) -> int:
    """Q of stacks (1+Q, ...) and parameters' changes (Q, ...), 0 where nothing changes.

    A stack of leading size 1 has not changed and goes with any Q. ValueError names the argument that differs.
    """
    counts = {name: len(x) - 1 for name, x in stacks.items() if x is not None and len(x) > 1}
    counts |= {name: len(x) for name, x in (changes or {}).items() if x is not None and x.dim()}
    for name, Q in counts.items():
        first, wanted = next(iter(counts.items()))
        if wanted != Q:
            raise ValueError(f"{name}: wanted Q = {wanted} queries, as {first} has, got {Q}")
    return next(iter(counts.values()), 0)
