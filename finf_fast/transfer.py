"""Stage 3, the device: a batch's tensors to where the model computes, without waiting where memory is pinned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finf_fast.loss import mapped


def to_device(batch: Any, device: torch.device) -> Any:
    """The same pytree with every tensor on ``device``; on a CPU nothing is copied."""

    def move(tensor: Tensor) -> Tensor:
        if tensor.device == device:
            return tensor
        source = tensor.pin_memory() if device.type == "cuda" and not tensor.is_pinned() else tensor
        return source.to(device, non_blocking=True)

    return mapped(move, batch)


def rows(batch: Any, start: int, stop: int) -> Any:
    """Samples ``[start, stop)`` of a batch, as views."""
    return mapped(lambda tensor: tensor[start:stop], batch)
