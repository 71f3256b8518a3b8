"""A query as a mirror step reads it: a batch of B rows, checked for shape before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

# unsigned types that torch stores but does not compute with
WIDER = {torch.uint16: torch.int64, torch.uint32: torch.int64, torch.uint64: torch.int64}


@dataclass(frozen=True)
class Query:
    """One query: the rows whose mean loss is stepped, and what errors call them."""

    batch: Any
    who: str = "query"

    @property
    def rows(self) -> int:
        return leaves(self.batch)[0].shape[0]

    def on(self, device: torch.device, dtype: torch.dtype) -> Query:
        """Copies of the rows on ``device``, floating-point tensors in ``dtype``.

        Copies, because torch cannot differentiate through a tensor that was made in inference mode.
        """

        def copied(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None, copy=True)

        return replace(self, batch=tree_map(copied, self.batch))

    def pick(self, rows: list[int], who: str) -> Query:
        """Some of the rows, as a query of their own."""
        index = torch.tensor(rows)
        return Query(tree_map(lambda t: t[index.to(t.device)], self.batch), who)


def title(name: str) -> str:
    """What an error calls the query of this name."""
    if not name:
        return "query"
    return name if name.startswith("query") else f"query {name!r}"


def read(batch: Any, who: str = "query") -> Query:
    """The user's batch as tensors; arrays and lists of numbers become tensors.

    Raises:
        TypeError: a leaf is not numbers.
        ValueError: no rows, a tensor without the leading sample dimension, or tensors that disagree on it.
    """
    tensors = tree_map(lambda leaf: _tensor(leaf, who), batch)
    counts = {tensor.shape[0] for tensor in leaves(tensors)}
    if not counts:
        raise ValueError(f"{who}: wanted a batch of tensors, got an empty {type(batch).__name__}")
    if len(counts) > 1:
        raise ValueError(f"{who}: wanted one leading dimension B for all tensors, got {sorted(counts)}")
    if counts == {0}:
        raise ValueError(f"{who}: wanted at least one row, got none (B = 0)")
    return Query(tensors, who)


def tree_map(function: Callable[[Any], Any], batch: Any) -> Any:
    """The batch with every leaf replaced; a sequence becomes a tuple, but a list of plain numbers is a leaf."""
    if isinstance(batch, Mapping):
        return {key: tree_map(function, value) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)) and not (batch and isinstance(batch, list) and _numbers(batch)):
        return tuple(tree_map(function, value) for value in batch)
    return function(batch)


def leaves(batch: Any) -> list[Tensor]:
    """Every tensor of a batch, in order."""
    found: list[Tensor] = []
    tree_map(found.append, batch)
    return found


def longest(batch: Any) -> int:
    """Of its samples' first dimension, such as tokens; 0 where they have none."""
    return max((tensor.shape[1] for tensor in leaves(batch) if tensor.dim() > 1), default=0)


def _numbers(values: list[Any]) -> bool:
    return all(isinstance(value, Real) for value in values)


def _tensor(leaf: Any, who: str) -> Tensor:
    if not isinstance(leaf, (Tensor, np.ndarray, np.generic, list, Real)):
        raise TypeError(f"{who}: wanted tensors, arrays, or a tuple or dict of them, got {type(leaf).__name__}")
    try:
        tensor = leaf.detach() if isinstance(leaf, Tensor) else torch.from_numpy(np.array(leaf, order="C"))
    except TypeError as error:
        raise TypeError(f"{who}: wanted numbers, got an array of {np.asarray(leaf).dtype}") from error
    if tensor.dim() == 0:
        raise ValueError(
            f"{who}: wanted a batch, every tensor with a leading dimension of rows, got a single unbatched value "
            f"{tensor.item()!r}; for one sample give (x[None], [label])"
        )
    return tensor.to(WIDER.get(tensor.dtype, tensor.dtype))
