"""Squared error of a prediction, row by row, and how much each query's change of the prediction moves it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["squared_error_delta"]

# A block of this size and its few copies stay in a processor's cache between the passes over it.
BLOCK_BYTES = 1 << 20


def squared_error_delta(p: Tensor, dp: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """See `finf_fast.ops.squared_error_delta`; float64 if an input is, else float32, also inside."""
    dtype = torch.float64 if torch.float64 in (p.dtype, dp.dtype, y.dtype) else torch.float32
    (N, D), Q = p.shape, len(dp)
    base, delta = p.new_empty(N, dtype=dtype), p.new_empty(Q, N, dtype=dtype)
    step = max(1, BLOCK_BYTES // (dtype.itemsize * max(D, 1))) if p.device.type == "cpu" else max(N, 1)
    for start in range(0, N, step):
        rows = slice(start, start + step)
        gap = p[rows].to(dtype) - y[rows].to(dtype)
        base[rows] = gap.square().sum(1)
        gap.mul_(2)
        for q in range(Q):
            d = dp[q, rows].to(dtype)
            delta[q, rows] = (gap + d).mul_(d).sum(1)
    return base, delta
