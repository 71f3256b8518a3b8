"""The K best scores seen so far, merged with a new block of scores."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["topk_merge"]


def topk_merge(values: Tensor, indices: Tensor, scores: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """See `finf_fast.ops.topk_merge`: two stable sorts, by index, then by score."""
    if values.device.type == "cpu":
        _check_sorted(values, indices)
    Q, S = scores.shape
    number = torch.arange(start, start + S, device=scores.device).expand(Q, S)
    v, i = torch.cat([values, scores], 1), torch.cat([indices, number], 1)
    empty = torch.isnan(v) | (i < 0)
    v = v.masked_fill(empty, -torch.inf)
    i = i.masked_fill(empty, torch.iinfo(torch.int64).max)  # empty places go behind a score that really is -inf
    i, order = i.sort(1)
    v, order = v.gather(1, order).sort(dim=1, descending=True, stable=True)
    K = values.shape[1]
    v, i = v[:, :K], i.gather(1, order)[:, :K]
    return v.contiguous(), i.masked_fill(i == torch.iinfo(torch.int64).max, -1)


def _check_sorted(values: Tensor, indices: Tensor) -> None:
    place = indices.masked_fill(indices < 0, torch.iinfo(torch.int64).max)
    risen = (values[:, 1:] > values[:, :-1]) | ((values[:, 1:] == values[:, :-1]) & (place[:, 1:] < place[:, :-1]))
    bad = torch.isnan(values).any(1) | risen.any(1)
    if bad.any():
        raise ValueError(
            f"values: wanted each row sorted, best first, without NaN, got row {int(bad.nonzero()[0])} out of order"
        )
