"""Stage 3, the device: a batch's tensors to where the model computes, without waiting where memory is pinned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def to_device(batch: Any, device: torch.device) -> Any:
    """The same pytree with every tensor on ``device``; on a CPU nothing is copied."""
    if isinstance(batch, Mapping):
        return {k: to_device(v, device) for k, v in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(to_device(v, device) for v in batch)
    if not isinstance(batch, Tensor) or batch.device == device:
        return batch
    source = batch.pin_memory() if device.type == "cuda" and not batch.is_pinned() else batch
    return source.to(device, non_blocking=True)


def rows(batch: Any, start: int, stop: int) -> Any:
    """Samples ``[start, stop)`` of a batch, as views."""
    if isinstance(batch, Mapping):
        return {k: rows(v, start, stop) for k, v in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(rows(v, start, stop) for v in batch)
    return batch[start:stop] if isinstance(batch, Tensor) else batch
