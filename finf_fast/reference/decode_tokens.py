"""Stored integers to int64: what staging does on the CPU, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["decode_tokens"]


def decode_tokens(raw: Tensor) -> Tensor:
    """See `finf_fast.ops.decode_tokens`."""
    return raw.to(torch.int64, memory_format=torch.contiguous_format)
