"""Sums of runs of neighbouring numbers: a sample's tokens into the sample, in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["segment_sum"]


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """See `finf_fast.ops.segment_sum`; adds left to right in float64 and rounds once at the end."""
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    if offsets.device.type == "cpu":
        _check_offsets(offsets, values.shape[1])
    columns = values.to(torch.float64).T.contiguous()
    sums = torch.segment_reduce(columns, "sum", offsets=offsets, axis=0, initial=0.0, unsafe=True)
    return sums.T.to(dtype)


def _check_offsets(offsets: Tensor, N: int) -> None:
    falls = (offsets[1:] < offsets[:-1]).nonzero()
    if len(falls):
        i = int(falls[0])
        raise ValueError(
            f"offsets: wanted non-decreasing, got offsets[{i}] = {int(offsets[i])} > offsets[{i + 1}] "
            f"= {int(offsets[i + 1])}"
        )
    first, last = int(offsets[0]), int(offsets[-1])
    if first < 0 or last > N:
        raise ValueError(f"offsets: wanted 0 <= offsets <= {N} (columns of values), got {first} to {last}")
