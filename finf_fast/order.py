"""Calls after which the rows of a batch may stand in another order, so that what they give cannot be told by sample.

A reordering that depends on the data (texts sorted by length, tokens sent to experts) leaves shapes as they are, and
may leave one batch as it is and not the next; so every call that can do it to the first dimension counts, done or not.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from finf_fast.calls import ordinary

__all__ = ["InOrder", "Mixed", "moves_samples"]

# Name -> place of its dimension among the arguments, and what that is by default; None: over all.
ALONG = {
    **dict.fromkeys(("index_select", "index_add", "index_copy", "index_fill", "gather"), (1, None)),
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), (1, None)),
    **{"sort": (1, -1), "topk": (2, -1), "flip": (1, None), "roll": (2, None), "take_along_dim": (2, None)},
    **{"unbind": (1, 0), "split": (2, 0), "chunk": (2, 0), "tensor_split": (2, 0), "repeat_interleave": (2, None)},
    **dict.fromkeys(("take", "masked_select", "masked_scatter", "index_put"), (99, None)),
}
INDEXED = (Tensor.__getitem__, Tensor.__setitem__)


class Mixed(Exception):
    """A layer whose rows cannot be told apart by sample, or not as they lie."""


class InOrder(TorchFunctionMode):
    """Inside this mode a call that may move samples raises :class:`Mixed`.

    To be entered last: what other modes make of a call is their own.

    Args:
        samples: B of the batch.
        fixed: addresses of the model's own tensors, whose rows are no samples.
    """

    def __init__(self, samples: int, fixed: Container[int]):
        super().__init__()
        self._samples, self._fixed = samples, fixed

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._samples > 1 and moves_samples(func, args, kwargs, self._samples) and ordinary():
            moved = args[0] if args else kwargs["input"]
            if moved.untyped_storage().data_ptr() not in self._fixed:
                name = getattr(func, "__name__", func)
                raise Mixed(f"{name} along the first dimension, which may move samples")
        return func(*args, **kwargs)


def _named() -> dict[Callable, tuple[int, int | None]]:
    homes = [(home, ending) for home in (torch, Tensor) for ending in ("", "_")]
    found = {getattr(home, name + ending, None): place for name, place in ALONG.items() for home, ending in homes}
    found.pop(None, None)
    return found


PLACES = _named()


def moves_samples(func: Callable, args: tuple[Any, ...], kwargs: Mapping[str, Any], samples: int) -> bool:
    """Whether a call may move rows of a tensor that has ``samples`` of them, or as many for each."""
    if func not in PLACES and func not in INDEXED:
        return False
    x = args[0] if args else kwargs.get("input")
    if type(x) is not Tensor or not x.dim() or not len(x) or len(x) % samples:
        return False
    if func in INDEXED:
        return _indexes_rows(x, args[1], samples)
    place, usual = PLACES[func]
    dims = args[place:] if func in (torch.flip, Tensor.flip) else args[place : place + 1]
    dims = dims or [kwargs.get("dim", kwargs.get("dims", usual))]
    flat = [d for given in dims for d in (given if isinstance(given, (tuple, list)) else (given,))]
    return any(d is None or d in (0, -x.dim()) for d in flat)


def _indexes_rows(x: Tensor, index: Any, samples: int) -> bool:
    """Whether an index picks rows by anything but a slice, or each its own."""
    items = [item for item in (index if isinstance(index, tuple) else (index,)) if item is not None]
    if not items or isinstance(items[0], slice):
        return False
    if items[0] is Ellipsis:
        return len(items) > x.dim()
    first = items[0]
    if isinstance(first, Tensor) and first.dtype == torch.long and first.numel() == len(x) == samples:
        return not torch.equal(first.flatten(), torch.arange(samples, device=first.device))
    return True
