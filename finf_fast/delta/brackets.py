"""What stands in brackets behind a tensor, as torch takes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_index(index: Any) -> tuple:
    """One for each dimension it concerns: arrays and lists as tensors, numpy's numbers as Python's."""
    if isinstance(index, list) and not all(isinstance(i, (bool, int, np.bool_, np.integer)) for i in index):
        index = tuple(index)  # torch's old habit
    return tuple(_one_index(i) for i in (index if isinstance(index, tuple) else (index,)))


def _one_index(i: Any) -> Any:
    if isinstance(i, np.integer):
        return int(i)
    if not isinstance(i, (list, tuple, range, np.ndarray)):
        return i
    found = torch.tensor(i)
    return found if found.numel() else found.long()


def splits(index: tuple) -> bool:
    """Whether torch puts the dimension picked by these where it depends on what else stands before the first one."""
    several = sum(isinstance(i, Tensor) for i in index)
    return several > 0 and several + sum(type(i) is int for i in index) > 1
