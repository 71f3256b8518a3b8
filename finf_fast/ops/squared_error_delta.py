"""Squared error of N predictions, and what Q changes of the predictions do to it, to the change's last digits."""

from __future__ import annotations

import torch
from torch import Tensor

from finf_fast import reference
from finf_fast.ops import dispatch
from finf_fast.ops.border import (
    CODES,
    FLOATS,
    check_dtype,
    check_rows,
    check_same_device,
    check_shape,
    place,
    result_dtype,
    rows,
)
from finf_fast.ops.register import register

__all__ = ["squared_error_delta", "squared_error_delta_out"]


def squared_error_delta(p: Tensor, dp: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of squared errors of each row, and its exact change for each query.

    In exact arithmetic::

        base     = ((p - y) ** 2).sum(1)
        delta[q] = ((p + dp[q] - y) ** 2).sum(1) - base  =  (dp[q] (2 (p - y) + dp[q])).sum(1)

    the last form being the one computed: no difference of squares (design section 2).

    Args:
        p: (N, D) prediction; float32, float64, bfloat16 or float16, any strides, as the other two.
        dp: (Q, N, D) change of the prediction, Q >= 0.
        y: (N, D) what was to be predicted.

    Returns:
        base (N,) and delta (Q, N), sums over D in the square of the prediction's unit: float64 if an input is, else
        float32, which is also the arithmetic inside.

    Raises:
        TypeError: a dtype not named above.
        ValueError: shapes or devices do not fit.
    """
    return _squared_error_delta(p, dp, y)


def squared_error_delta_out(p: Tensor, dp: Tensor, y: Tensor, base: Tensor, delta: Tensor) -> None:
    """`squared_error_delta` written into `base` (N,) and `delta` (Q, N), whose rows may lie any distance apart.

    They have the dtype that `squared_error_delta` would return and share no memory with the inputs; otherwise
    TypeError. ValueError if their shape, device or layout (last stride 1) is another.
    """
    _squared_error_delta_out(p, dp, y, base, delta)


def _allocate(p, dp, y):
    _check(p, dp, y)
    dtype = result_dtype(p, dp, y)
    return p.new_empty(p.shape[0], dtype=dtype), p.new_empty(dp.shape[:2], dtype=dtype)


def _check_out(p, dp, y, base, delta):
    _check(p, dp, y)
    check_shape("base", base, "N", p.shape[0])
    check_shape("delta", delta, "Q,N", *dp.shape[:2])
    for name, x in (("base", base), ("delta", delta)):
        check_dtype(name, x, result_dtype(p, dp, y))
        check_rows(name, x)
    check_same_device(p=p, base=base, delta=delta)


def _check(p: Tensor, dp: Tensor, y: Tensor) -> None:
    for name, x in (("p", p), ("dp", dp), ("y", y)):
        check_dtype(name, x, *FLOATS)
    check_shape("p", p, "N,D", None, None)
    check_shape("dp", dp, "Q,N,D", None, *p.shape)
    check_shape("y", y, "N,D", *p.shape)
    check_same_device(p=p, dp=dp, y=y)


def _run(p, dp, y, base, delta):
    _FACES[dispatch.choose("squared_error_delta", p, dp, y)](p, dp, y, base, delta)


def _run_reference(p, dp, y, base, delta):
    loss, change = reference.squared_error_delta(p, dp, y)
    base.copy_(loss)
    delta.copy_(change)


def _run_cpp(p, dp, y, base, delta):
    p, dp, y = rows(p), rows(dp), rows(y)
    dispatch.compiled().squared_error_delta(
        *(p.data_ptr(), CODES[p.dtype], p.stride(0)),
        *(dp.data_ptr(), CODES[dp.dtype], dp.stride(0), dp.stride(1)),
        *(y.data_ptr(), CODES[y.dtype], y.stride(0)),
        *(base.data_ptr(), delta.data_ptr(), delta.stride(0)),
        *(*p.shape, len(dp), torch.get_num_threads()),
    )


def _run_cuda(p, dp, y, base, delta):
    p, dp, y = rows(p), rows(dp), rows(y)
    dispatch.compiled_cuda().squared_error_delta(
        *place(p),
        *(p.data_ptr(), CODES[p.dtype], p.stride(0)),
        *(dp.data_ptr(), CODES[dp.dtype], dp.stride(0), dp.stride(1)),
        *(y.data_ptr(), CODES[y.dtype], y.stride(0)),
        *(base.data_ptr(), delta.data_ptr(), delta.stride(0)),
        *(*p.shape, len(dp)),
    )


_FACES = {"cpp": _run_cpp, "cuda": _run_cuda, "reference": _run_reference}


@register("squared_error_delta", "(Tensor p, Tensor dp, Tensor y) -> (Tensor, Tensor)", _allocate)
def _squared_error_delta(p, dp, y):
    base, delta = _allocate(p, dp, y)
    _run(p, dp, y, base, delta)
    return base, delta


@register(
    "squared_error_delta_out",
    "(Tensor p, Tensor dp, Tensor y, Tensor(a!) base, Tensor(b!) delta) -> ()",
    _check_out,
)
def _squared_error_delta_out(p, dp, y, base, delta):
    _check_out(p, dp, y, base, delta)
    _run(p, dp, y, base, delta)
