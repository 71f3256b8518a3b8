"""An activation function on a stack of (value, exact changes), with or without a gate."""

from __future__ import annotations

import torch
from torch import Tensor

from finf_fast.reference.changes import CHANGES, VALUES
from finf_fast.reference.stacks import arithmetic, pieces, queries, split

__all__ = ["activation_delta"]

# Numbers of a stack worked on at a time: with the temporaries 4 to 6 MiB in float32, about a core's cache.
# Measured (Zen 5, one core, gelu_tanh, (5, 512, 3072) bfloat16): 2^14 28 ms, 2^16 18, 2^18 16, 2^20 21.
_PIECE = 1 << 18


def activation_delta(stack: Tensor, kind: str, gate: Tensor | None = None) -> Tensor:
    """See `finf_fast.ops.activation_delta`."""
    Q, shape = queries(stack, gate), stack.shape[1:]
    out = stack.new_empty(1 + Q, *shape)
    x, y = stack.reshape(len(stack), -1), out.view(1 + Q, shape.numel())
    g = None if gate is None else gate.reshape(len(gate), -1)
    # A corner neither multiplies nor rounds a term: in half precision its one sum is as good as in any.
    dtype = stack.dtype if kind == "relu" and g is None else arithmetic(stack.dtype)
    for at in pieces(shape.numel(), 1 + Q, _PIECE):
        a0, da = split(x[:, at], dtype)
        value, change = VALUES[kind](a0), CHANGES[kind](a0, da)
        if g is not None:
            value, change = _times(value, change, *split(g[:, at], dtype))
        y[:1, at] = value
        y[1:, at] = change
    return out


def _times(a0: Tensor, da: Tensor, g0: Tensor, dg: Tensor) -> tuple[Tensor, Tensor]:
    """The product rule, exactly: d(ag) = da g0 + (a0 + da) dg; a factor without changes contributes none."""
    if not len(dg):
        return a0 * g0, da.mul_(g0)
    if not len(da):
        return a0 * g0, a0 * dg
    return a0 * g0, torch.addcmul(da * g0, da + a0, dg)
