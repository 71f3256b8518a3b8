"""Layer norm of a stack of (value, exact changes)."""

from __future__ import annotations

from torch import Tensor

from finf_fast.reference.normalize import PIECE, affine_, normalize
from finf_fast.reference.stacks import arithmetic, pieces, queries, split

__all__ = ["layer_norm_delta", "row_norm"]


def layer_norm_delta(stack, weight, bias, *, dweight=None, dbias=None, residual=None, eps=1e-5):
    """See `finf_fast.ops.layer_norm_delta`."""
    return row_norm(stack, weight, bias, dweight, dbias, residual, eps, centred=True)


def row_norm(
    stack: Tensor, weight, bias, dweight, dbias, residual, eps: float, *, centred: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """Norm over the last dimension, some rows of all queries at a time; with a residual also the sum."""
    Q, shape = queries(stack, residual, changes=(dweight, dbias)), stack.shape[1:]
    D, N = shape[-1], shape[:-1].numel()
    dtype = arithmetic(stack.dtype)
    weight, bias, dweight, dbias = (x if x is None else x.to(dtype) for x in (weight, bias, dweight, dbias))
    changes = tuple(x if x is None else x[:, None] for x in (dweight, dbias))
    x, y = stack.reshape(len(stack), N, D), stack.new_empty(1 + Q, N, D)
    other = None if residual is None else residual.reshape(len(residual), N, D)
    moved = max(len(stack), 1 if residual is None else len(residual))
    summed = None if residual is None else stack.new_empty(moved, N, D)
    for at in pieces(N, (1 + Q) * D, PIECE):
        h, d = split(x[:, at], dtype)
        if summed is not None:
            h, d = _added(h, d, *split(other[:, at], dtype))
            summed[:1, at] = h
            summed[1:, at] = d
        affine_(y[:, at], *normalize(h, d, eps, centred=centred), weight, bias, *changes)
    normed = y.view(1 + Q, *shape)
    return normed if summed is None else (normed, summed.view(moved, *shape))


def _added(h: Tensor, d: Tensor, g: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    return h + g, d + e if len(d) and len(e) else d if len(d) else e
