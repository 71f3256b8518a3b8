"""Layer norm of a stack of (value, exact changes), its own parameters' changes included."""

from __future__ import annotations

import torch
from torch import Tensor

from finf_fast import reference
from finf_fast.ops import dispatch
from finf_fast.ops.border import CODES, FLOATS, check_dtype, check_same_device, check_shape
from finf_fast.ops.register import register
from finf_fast.ops.stacks import address, check_stack, parameter, stack_of_rows, stacked_queries, told

__all__ = ["check_norm", "layer_norm_delta"]


def layer_norm_delta(
    stack: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | tuple[Tensor, Tensor]:
    """What `torch.nn.functional.layer_norm` over the last dimension gives, and how much each query's change moves it.

    A stack holds the value in row 0 and the change of query q in row 1+q. With c the centred values, v their mean
    square plus eps, r = 1/sqrt(v), and 0, 1 for before and after::

        y[0]    = c0 r0 weight + bias
        v1 - v0 = mean(dc (2 c0 + dc))
        r1 - r0 = -(v1 - v0) r0 r1 / (1/r0 + 1/r1)
        y[1+q]  = (dc r1 + c0 (r1 - r0)) weight + c1 r1 dweight_q + dbias_q

    exactly the difference of the layer after and before, and no term of it a difference of two near numbers.

    Args:
        stack: (1+Q, ..., D), or (1, ..., D) where it has not changed; float32, float64, bfloat16 or float16, any
            strides.
        weight: (D), or None for 1; any of those dtypes, as are all parameters.
        bias: (D), or None for 0.
        dweight: (Q, D) change of the weight, or None.
        dbias: (Q, D) change of the bias, or None.
        residual: a stack of the same dtype and shape, or (1, ..., D) where it has not changed. It is added first,
            values to values and changes to changes, and the sum enters the norm before it is rounded.
        eps: added to the variance (in its unit).

    Returns:
        (1+Q, ..., D) in the stack's dtype, contiguous; (1, ..., D) where nothing changes. With a residual the pair of
        that and the sum, whose leading size is the larger one of its terms. The arithmetic inside is float64 for
        float64, else float32; results are rounded once. A processor that rounds to bfloat16 itself makes those below
        1.2e-38 zero.

    Raises:
        TypeError: a dtype not named above, or the residual's is not the stack's.
        ValueError: shapes, numbers of queries or devices do not fit; eps below 0.

    Source: design section 2, "norms".
    """
    out = _layer_norm_delta(stack, weight, bias, dweight, dbias, residual, eps)
    return out[0] if residual is None else (out[0], out[1])


def check_norm(stack: Tensor, C: int, letter: str, weight, bias, dweight, dbias, eps: float) -> None:
    """Dtypes, shapes and device of a norm's parameters, C of them, and of their changes."""
    one, each = (letter, (C,)), (f"Q,{letter}", (None, C))
    given = (("weight", weight, one), ("bias", bias, one), ("dweight", dweight, each), ("dbias", dbias, each))
    for name, x, (letters, sizes) in given:
        if x is not None:
            check_dtype(name, x, *FLOATS)
            check_same_device(stack=stack, **{name: x})
            check_shape(name, x, letters, *sizes)
    if not eps >= 0:
        raise ValueError(f"eps: wanted a number from 0, got {eps}")


def check_row_norm(stack: Tensor, weight, bias, dweight, dbias, residual, eps: float) -> tuple[int, ...]:
    """The whole check of a norm over the last dimension; gives the leading sizes of its results."""
    check_dtype("stack", stack, *FLOATS)
    check_stack("stack", stack)
    if stack.dim() < 2:
        raise ValueError(f"stack: wanted (1+Q, ..., D), got shape {tuple(stack.shape)}")
    check_norm(stack, stack.shape[-1], "D", weight, bias, dweight, dbias, eps)
    if residual is not None:
        check_dtype("residual", residual, stack.dtype)
        check_stack("residual", residual, stack.shape[1:])
        check_same_device(stack=stack, residual=residual)
    stacks = {"stack": stack, "residual": residual}
    Q = stacked_queries(stacks, {"dweight": dweight, "dbias": dbias})
    return (1 + Q,) if residual is None else (1 + Q, 1 + stacked_queries(stacks))


def results(stack: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """What a norm writes, with nothing in it yet: of the stack's shape but for the leading sizes."""
    return [stack.new_empty(size, *stack.shape[1:]) for size in sizes]


def _allocate(stack, weight, bias, dweight, dbias, residual, eps):
    return results(stack, check_row_norm(stack, weight, bias, dweight, dbias, residual, eps))


def _run_reference(stack, weight, bias, dweight, dbias, residual, eps, _):
    out = reference.layer_norm_delta(stack, weight, bias, dweight=dweight, dbias=dbias, residual=residual, eps=eps)
    return [out] if residual is None else list(out)


def _run_cpp(stack, weight, bias, dweight, dbias, residual, eps, sizes):
    out = results(stack, sizes)
    x, other = (stack_of_rows(s, stack.shape[-1]) for s in (stack, residual))
    params = [parameter(p) for p in (weight, bias, dweight, dbias)]
    dispatch.compiled().layer_norm_delta(
        *(CODES[stack.dtype], *told(x), *told(other), *map(address, params)),
        *(out[0].data_ptr(), address(out[1]) if len(out) > 1 else 0),
        *(x.shape[1], x.shape[2], sizes[0] - 1, eps, torch.get_num_threads()),
    )
    return out


def _run_triton(stack, weight, bias, dweight, dbias, residual, eps, sizes):
    from finf_fast.kernels import layer_norm_delta as kernel

    out = results(stack, sizes)
    if stack.numel():
        x, other, y, total = rows_of_norm(stack, residual, out)
        params = [parameter(p) for p in (weight, bias, dweight, dbias)]
        kernel.layer_norm_delta(x, other, *params, y, total, eps)
    return out


def rows_of_norm(stack: Tensor, residual: Tensor | None, out: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Stack, residual and results as (1+Q, N, D); a stack with gaps inside a row is copied."""
    D = stack.shape[-1]
    x, other = (stack_of_rows(s, D) for s in (stack, residual))
    y, total = (s.view(len(s), -1, D) for s in out) if len(out) > 1 else (out[0].view(len(out[0]), -1, D), None)
    return x, other, y, total


# Each is told the leading sizes that the check found.
_FACES = {"cpp": _run_cpp, "triton": _run_triton, "reference": _run_reference}


@register(
    "layer_norm_delta",
    "(Tensor stack, Tensor? weight, Tensor? bias, Tensor? dweight, Tensor? dbias, Tensor? residual, float eps)"
    " -> Tensor[]",
    _allocate,
)
def _layer_norm_delta(stack, weight, bias, dweight, dbias, residual, eps):
    sizes = check_row_norm(stack, weight, bias, dweight, dbias, residual, eps)
    face = dispatch.choose("layer_norm_delta", stack)
    return _FACES[face](stack, weight, bias, dweight, dbias, residual, eps, sizes)
