"""Stored bytes to numbers by a table a channel: what staging does on the CPU, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["decode_pixels"]


def decode_pixels(raw: Tensor, table: Tensor, run: int) -> Tensor:
    """See `finf_fast.ops.decode_pixels`; an index of 8 bytes for every byte on the way."""
    first = torch.arange(len(table), device=raw.device)[:, None] * 256
    rows = raw.reshape(-1, len(table), run).long() + first
    return table.reshape(-1)[rows].view(raw.shape)
