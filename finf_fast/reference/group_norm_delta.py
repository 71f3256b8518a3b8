"""Group norm of a stack of (value, exact changes)."""

from __future__ import annotations

from torch import Tensor

from finf_fast.reference.normalize import PIECE, affine_, normalize
from finf_fast.reference.stacks import arithmetic, pieces, queries, split

__all__ = ["group_norm_delta"]


def group_norm_delta(stack: Tensor, groups: int, weight, bias, *, dweight=None, dbias=None, eps=1e-5) -> Tensor:
    """See `finf_fast.ops.group_norm_delta`."""
    Q = queries(stack, changes=(dweight, dbias))
    B, C, *spatial = stack.shape[1:]
    dtype = arithmetic(stack.dtype)
    S = stack.shape[3:].numel()
    weight, bias = (x if x is None else x.to(dtype)[:, None] for x in (weight, bias))
    dweight, dbias = (x if x is None else x.to(dtype)[:, None, :, None] for x in (dweight, dbias))
    x, y = stack.reshape(len(stack), B, C, S), stack.new_empty(1 + Q, B, C, S)
    for at in pieces(B, (1 + Q) * C * S, PIECE):
        h, d = split(x[:, at], dtype)
        rows = (at.stop - at.start) * groups, C // groups * S
        n0, dn = normalize(h.reshape(1, *rows), d.reshape(len(d), *rows), eps, centred=True)
        affine_(y[:, at], n0.view(h.shape), dn.view(d.shape), weight, bias, dweight, dbias)
    return y.view(1 + Q, B, C, *spatial)
