"""A linear layer on a stack of (value, changes), where input, weight and bias may all have changed."""

from __future__ import annotations

from torch import Tensor

from finf_fast.reference.product import add_linear_, linear

__all__ = ["linear_delta"]


def linear_delta(
    stack: Tensor,
    W: Tensor,
    bias: Tensor | None = None,
    *,
    dW: Tensor | None = None,
    dW_factors: tuple[Tensor, Tensor] | None = None,
    db: Tensor | None = None,
) -> Tensor:
    """See `finf_fast.ops.linear_delta`; products in the stack's dtype, the changed weight's share added in place."""
    factors = dW_factors or ()
    Q = max(len(stack) - 1, *[len(c) for c in (dW, db, *factors) if c is not None], 0)
    y = _shared(stack, W, bias, Q)
    x0, dx, dy = stack[0], stack[1:], y[1:]
    if factors:
        _add_low_rank(dy, x0, dx, *[factor.to(stack.dtype) for factor in factors])
    if dW is not None:
        _add_dense(dy, x0, dx, dW.to(stack.dtype))
    if db is not None:
        dy.add_(db[:, None])
    return y


def _shared(stack: Tensor, W: Tensor, bias: Tensor | None, Q: int) -> Tensor:
    """(1+Q, N, D'): the part of the weight that all rows have in common, as one product; the bias is the base's."""
    if len(stack) == 1 + Q:
        y = linear(stack, W)
    else:
        y = stack.new_zeros(1 + Q, stack.shape[1], len(W))
        y[0] = linear(stack[0], W)
    if bias is not None:
        y[0].add_(bias)
    return y


def _add_low_rank(dy: Tensor, x0: Tensor, dx: Tensor, U: Tensor, V: Tensor) -> None:
    """dy_q += (x0 + dx_q) V_q U_qᵀ, the changed input never formed."""
    (Q, D, r), N = V.shape, len(x0)
    inner = linear(x0, V.mT.reshape(Q * r, D)).view(N, Q, r).transpose(0, 1)  # one product for all queries
    if len(dx):
        add_linear_(inner, dx, V.mT)
    add_linear_(dy, inner, U)


def _add_dense(dy: Tensor, x0: Tensor, dx: Tensor, dW: Tensor) -> None:
    """dy_q += (x0 + dx_q) dW_qᵀ, a product per query."""
    for q, change in enumerate(dW):
        x1 = x0 + dx[q] if len(dx) else x0
        add_linear_(dy[q : q + 1], x1[None], change[None])
