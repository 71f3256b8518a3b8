"""The arithmetic that layer, RMS and group norm share, each on (value, exact changes)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["PIECE", "affine_", "normalize"]

# Numbers of a stack worked on at a time: with the temporaries about 4 MiB in float32, a core's share of the cache.
PIECE = 1 << 18


def normalize(h: Tensor, d: Tensor, eps: float, *, centred: bool) -> tuple[Tensor, Tensor]:
    """(n0, dn): c r over the last dimension, c the (centred) values and r = 1 / sqrt(mean c^2 + eps), and its change.

    h (1, N, D), d (Q, N, D). With c1 = c0 + dc and s = 1/r::

        v1 - v0 = mean(dc (c0 + c1))        r1 - r0 = -(v1 - v0) / ((s0 + s1) s0 s1)        dn = dc r1 + c0 (r1 - r0)
    """
    c0 = h - h.mean(-1, keepdim=True) if centred else h
    if centred:
        c0 -= c0.mean(-1, keepdim=True)  # the first mean's last digit, which a large common part leaves in every value
    s0 = c0.square().mean(-1, keepdim=True).add_(eps).sqrt_()
    if not len(d):
        return c0 / s0, d
    dc = d - d.mean(-1, keepdim=True) if centred else d
    c1 = c0 + dc
    s1 = c1.square().mean(-1, keepdim=True).add_(eps).sqrt_()  # its own sum: v0 + dv could end below 0
    dv = c1.add_(c0).mul_(dc).mean(-1, keepdim=True)
    dr = -dv / (s0 + s1) / s0 / s1
    return c0 / s0, torch.mul(dc, 1 / s1, out=c1).addcmul_(c0, dr)


def affine_(out: Tensor, n0: Tensor, dn: Tensor, weight, bias, dweight, dbias) -> None:
    """n weight + bias and its change into `out` (1+Q, ...); parameters are None or shaped to broadcast.

    The change is dn weight + (n0 + dn) dweight + dbias; no weight counts as 1.
    """
    value = n0 if weight is None else n0 * weight
    out[:1] = value if bias is None else value + bias
    change = None
    if len(dn):
        change = dn if weight is None else dn * weight
    if dweight is not None:
        moved = (n0 + dn if len(dn) else n0) * dweight
        change = moved if change is None else moved.add_(change)
    if dbias is not None:
        change = dbias if change is None else change.add_(dbias)
    if change is not None:
        out[1:] = change
