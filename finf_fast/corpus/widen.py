"""Integers of any width as the one that losses and embeddings want."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["integers"]


def integers(array: np.ndarray) -> torch.Tensor:
    """A new int64 tensor of an integer array of any width and byte order.

    Raises:
        ValueError: a uint64 value does not fit.
    """
    highest = np.iinfo(np.int64).max
    if array.dtype.kind == "u" and array.dtype.itemsize == 8 and array.size and array.max() > highest:
        raise ValueError(f"source: wanted integers up to {highest}, got {array.max()}")
    return torch.from_numpy(array.astype(np.int64, order="C"))
