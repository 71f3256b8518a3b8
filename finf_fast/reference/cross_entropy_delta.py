"""Cross entropy of a row of logits, and how much each query's change of the logits moves it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cross_entropy_delta"]


def cross_entropy_delta(
    z: Tensor, dz: Tensor, target: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """See `finf_fast.ops.cross_entropy_delta`; float64 if an input is, else float32, also inside."""
    dtype = torch.float64 if torch.float64 in (z.dtype, dz.dtype) else torch.float32
    z, dz = z.to(dtype), dz.to(dtype)
    ignored = target == ignore_index
    t = _columns(target, ignored, z.shape[1], ignore_index)
    m = z.amax(1, keepdim=True)
    a, a_t = z - m, z.gather(1, t) - m
    e, e_t = torch.exp(a), torch.exp(a_t)
    others = e.scatter(1, t, 0).sum(1, keepdim=True)
    s = others + e_t
    base = _loss(a, a_t, others, s, label_smoothing)
    d = dz - _own_change(dz, t, label_smoothing)  # the target's own column: exactly 0 without smoothing
    delta = _change(a, e, s, d)
    return base.masked_fill(ignored, 0), delta.masked_fill(ignored, 0)


def _columns(target: Tensor, ignored: Tensor, V: int, ignore_index: int) -> Tensor:
    """(N, 1) column of each row's target, 0 for ignored rows; checked where looking does not stop a device."""
    if target.device.type == "cpu":
        bad = ~ignored & ((target < 0) | (target >= V))
        if bad.any():
            row = int(bad.nonzero()[0])
            got = f"got {int(target[row])} in row {row}"
            raise IndexError(f"target: wanted 0 to {V - 1} or ignore_index {ignore_index}, {got}")
    return target.masked_fill(ignored, 0)[:, None]


def _own_change(dz: Tensor, t: Tensor, smoothing: float) -> Tensor:
    """(Q, N, 1) change of the smoothed target's logit: what every column's change is measured against."""
    d_t = dz.gather(2, t.expand(len(dz), -1, -1))
    return d_t + smoothing * (dz.mean(2, keepdim=True) - d_t) if smoothing else d_t


def _loss(a: Tensor, a_t: Tensor, others: Tensor, s: Tensor, smoothing: float) -> Tensor:
    """(N,) loss. Where the target leads (a_t = 0) log1p keeps the digits that log s - a_t loses."""
    hard = torch.where(a_t == 0, torch.log1p(others), torch.log(s) - a_t)[:, 0]
    return (1 - smoothing) * hard + smoothing * (torch.log(s)[:, 0] - a.mean(1)) if smoothing else hard


def _change(a: Tensor, e: Tensor, s: Tensor, d: Tensor) -> Tensor:
    """(Q, N) log(sum e^(a+d) / s), by log1p unless the sum more than halves or leaves the dtype's range."""
    # Past 20 expm1 is exp; taken as one exponential, a column that e cannot hold still counts, and none gives 0 * inf.
    u = torch.where(d > 20, torch.exp(a + d) - e, e * torch.expm1(d)).sum(2)
    ratio = u / s[:, 0]
    large = ~((ratio > -0.5) & (ratio < torch.inf))
    return torch.where(large, torch.logsumexp(a + d, 2) - torch.log(s)[:, 0], torch.log1p(ratio))
