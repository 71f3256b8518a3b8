"""A linear layer on a stack of (value, exact changes): nearly all of the work in a net."""

from __future__ import annotations

import torch
from torch import Tensor

from finf_fast import reference
from finf_fast.ops import dispatch
from finf_fast.ops.border import CODES, FLOATS, check_dtype, check_same_device, check_shape, rows
from finf_fast.ops.register import register
from finf_fast.ops.stacks import address, parameter

__all__ = ["check_changes", "factors_of", "linear_delta", "queries"]


def linear_delta(
    stack: Tensor,
    W: Tensor,
    bias: Tensor | None = None,
    *,
    dW: Tensor | None = None,
    dW_factors: tuple[Tensor, Tensor] | None = None,
    db: Tensor | None = None,
) -> Tensor:
    """What `torch.nn.functional.linear` gives, and by how much each query's changes move it.

    A stack holds the value in row 0 and the change of query q in row 1+q. With x0 = stack[0], d_q = stack[1+q]::

        y[0]   = x0 Wᵀ + bias
        y[1+q] = d_q Wᵀ + (x0 + d_q) dW_qᵀ + db_q        dW_q = U_q V_qᵀ where factors are given

    exactly the difference of the layer after and before, and no term of it a difference of two near numbers. Where a
    processor multiplies bfloat16 itself, numbers below 1.2e-38 are zero to it.

    Args:
        stack: (1+Q, N, D), or (1, N, D) where the input has not changed; float32, float64, bfloat16 or float16, any
            strides.
        W: (D', D) in the stack's dtype.
        bias: (D') or None; any of those dtypes, as is every change below. Changes of the weight are rounded to the
            stack's dtype.
        dW: (Q, D', D) dense change of the weight, or None.
        dW_factors: (U, V), a change of rank r: U (Q, D', r), V (Q, D, r); not beside `dW`.
        db: (Q, D') change of the bias, whether or not there is a bias.

    Returns:
        (1+Q, N, D') in the stack's dtype; (1, N, D') where nothing changes.

    Raises:
        TypeError: a dtype not named above, or W's is not the stack's.
        ValueError: shapes, numbers of queries or devices do not fit; both forms of the change are given.

    Source: design section 2, "a linear map" and "a changed weight".
    """
    U, V = factors_of(dW, dW_factors)
    return _linear_delta(stack, W, bias, dW, U, V, db)


def factors_of(dW: Tensor | None, dW_factors: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    """(U, V), or two Nones; ValueError beside a dense change or if they are not two."""
    if dW_factors is None:
        return None, None
    if dW is not None:
        raise ValueError("dW_factors: wanted None where dW is given, got both forms of the weight's change")
    if len(dW_factors) != 2:
        raise ValueError(f"dW_factors: wanted two tensors (U, V), got {len(dW_factors)}")
    return dW_factors[0], dW_factors[1]


def queries(**changes: Tensor | None) -> int:
    """Q, the leading size that all given changes share, 0 without any; ValueError names one that differs."""
    given = {name: x.shape[0] for name, x in changes.items() if x is not None and x.dim()}
    for name, Q in given.items():
        first, wanted = next(iter(given.items()))
        if wanted != Q:
            raise ValueError(f"{name}: wanted Q = {wanted} queries, as {first} has, got {Q}")
    return next(iter(given.values()), 0)


def check_changes(Q: int, W: Tensor, bias, dW, U, V, db, letter: str) -> None:
    """Dtypes, shapes and device of the parameters of a linear layer (`letter`, D) and of their changes."""
    rows, D = W.shape
    r = U.shape[2] if U is not None and U.dim() == 3 else None
    wanted = {
        "bias": (bias, letter, (rows,)),
        "dW": (dW, f"Q,{letter},D", (Q, rows, D)),
        "dW_factors U": (U, f"Q,{letter},r", (Q, rows, None)),
        "dW_factors V": (V, "Q,D,r", (Q, D, r)),
        "db": (db, f"Q,{letter}", (Q, rows)),
    }
    for name, (x, letters, sizes) in wanted.items():
        if x is not None:
            check_dtype(name, x, *FLOATS)
            check_shape(name, x, letters, *sizes)
            check_same_device(W=W, **{name: x})


def _allocate(stack, W, bias, dW, U, V, db):
    Q = _check(stack, W, bias, dW, U, V, db)
    return stack.new_empty(1 + Q, stack.shape[1], W.shape[0])


def _check(stack: Tensor, W: Tensor, bias, dW, U, V, db) -> int:
    check_dtype("stack", stack, *FLOATS)
    check_dtype("W", W, stack.dtype)
    check_shape("stack", stack, "1+Q,N,D", None, None, None)
    check_shape("W", W, "D',D", None, stack.shape[2])
    check_same_device(stack=stack, W=W)
    if stack.shape[0] == 0:
        raise ValueError(f"stack: wanted the value and its changes (1+Q,N,D), got shape {tuple(stack.shape)}")
    moved = stack[1:] if stack.shape[0] > 1 else None
    Q = queries(stack=moved, dW=dW, db=db, **{"dW_factors U": U, "dW_factors V": V})
    check_changes(Q, W, bias, dW, U, V, db, "D'")
    return Q


def _run_reference(stack, W, bias, dW, U, V, db, _):
    factors = None if U is None else (U, V)
    return reference.linear_delta(stack, W, bias, dW=dW, dW_factors=factors, db=db)


def _run_cpp(stack, W, bias, dW, U, V, db, Q):
    y = stack.new_empty(1 + Q, stack.shape[1], W.shape[0])
    (_, N, D), r = stack.shape, 0 if U is None else U.shape[2]
    stack, turned = rows(stack), W.stride(0) == 1 and W.stride(1) != 1
    W = W.mT if turned else rows(W)
    dW, U, R = (None if x is None else x.to(stack.dtype).contiguous() for x in (dW, U, None if V is None else V.mT))
    bias, db = parameter(bias), parameter(db)
    dispatch.compiled().linear_delta(
        *(
            CODES[stack.dtype],
            stack.data_ptr(),
            *stack.stride()[:2],
            stack.shape[0] > 1,
            W.data_ptr(),
            W.stride(0),
            turned,
        ),
        *map(address, (bias, db, dW, U, R, y)),
        *(N, D, y.shape[2], Q, r, torch.get_num_threads()),
    )
    return y


def _run_triton(stack, W, bias, dW, U, V, db, Q):
    from finf_fast.kernels import linear_delta as kernel

    y = stack.new_empty(1 + Q, stack.shape[1], W.shape[0])
    if y.numel():
        dW, db, U = (None if x is None or not x.numel() else x for x in (dW, db, U))
        factors = None if U is None else (U, V)
        kernel.linear_delta(stack, W, None if bias is None else bias.contiguous(), dW, factors, db, y)
    return y


# Each is told how many queries the check found.
_FACES = {"cpp": _run_cpp, "triton": _run_triton, "reference": _run_reference}


@register(
    "linear_delta",
    "(Tensor stack, Tensor W, Tensor? bias, Tensor? dW, Tensor? U, Tensor? V, Tensor? db) -> Tensor",
    _allocate,
)
def _linear_delta(stack, W, bias, dW, U, V, db):
    Q = _check(stack, W, bias, dW, U, V, db)
    return _FACES[dispatch.choose("linear_delta", stack)](stack, W, bias, dW, U, V, db, Q)
